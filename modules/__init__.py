"""Torch modules that ranking models are made of."""

from mlenv.modules.cross_net import CrossNet, CrossNetConfig
from mlenv.modules.embeddings import ENGINES, EmbeddedFeatures, EmbeddedSequence, Embeddings, TorchEmbeddings, TorchRecEmbeddings
from mlenv.modules.field_tokens import FieldTokens
from mlenv.modules.heads import TaskHeads
from mlenv.modules.losses import weighted_binary_cross_entropy
from mlenv.modules.mean_pooling import MeanPooling, MeanPoolingConfig
from mlenv.modules.mlp import MLP, MLPConfig
from mlenv.modules.normalization import NumericNormalization
from mlenv.modules.ranker import Ranker, RankerConfig
from mlenv.modules.representation import Representation
from mlenv.modules.shared_bottom import SharedBottom, SharedBottomConfig

__all__ = [
    "ENGINES",
    "MLP",
    "CrossNet",
    "CrossNetConfig",
    "EmbeddedFeatures",
    "EmbeddedSequence",
    "Embeddings",
    "FieldTokens",
    "MLPConfig",
    "MeanPooling",
    "MeanPoolingConfig",
    "NumericNormalization",
    "Ranker",
    "RankerConfig",
    "Representation",
    "SharedBottom",
    "SharedBottomConfig",
    "TaskHeads",
    "TorchEmbeddings",
    "TorchRecEmbeddings",
    "weighted_binary_cross_entropy",
]
