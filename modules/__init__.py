"""Torch modules that ranking models are made of."""

from mlenv.modules.cross_net import CrossNet, CrossNetConfig
from mlenv.modules.crossing_stack import CrossingEnsemble, CrossingEnsembleConfig, CrossingStack, CrossingStackConfig
from mlenv.modules.crossings import CROSSINGS, CrossingConfig
from mlenv.modules.delayed_feedback import FakeNegativeWeightedConfig, FakeNegativeWeightedLoss
from mlenv.modules.distillation import Distillation, Taught, pairwise_divergence, soft_label_divergence
from mlenv.modules.dot_interaction import DotInteraction, DotInteractionConfig
from mlenv.modules.embeddings import ENGINES, EmbeddedFeatures, EmbeddedSequence, Embeddings, TorchEmbeddings, TorchRecEmbeddings
from mlenv.modules.entire_space_heads import EntireSpaceHeads
from mlenv.modules.experts import ExpertGates, ExpertNetworks, gate_gauges
from mlenv.modules.factorization_machine import FactorizationMachine, FactorizationMachineConfig
from mlenv.modules.feature_dropout import FeatureDropout, FeatureDropoutConfig, SourceConfig
from mlenv.modules.field_attention import AutoInt, AutoIntConfig, FieldTransformer, FieldTransformerConfig
from mlenv.modules.field_nulls import FieldNulls
from mlenv.modules.field_tokens import FieldTokens
from mlenv.modules.final_mlp import FinalMLP, FinalMLPConfig
from mlenv.modules.gated_cross_net import GatedCrossNet, GatedCrossNetConfig
from mlenv.modules.heads import TaskHeads
from mlenv.modules.histogram_calibration import HistogramCalibrator, HistogramConfig
from mlenv.modules.hstu import HSTU, HSTUConfig
from mlenv.modules.isotonic_calibration import IsotonicCalibrator, IsotonicConfig
from mlenv.modules.logistic_calibration import (
    AffineCalibrator,
    LogisticConfig,
    NegativeSamplingConfig,
    PlattConfig,
    SegmentCalibrator,
    TemperatureConfig,
)
from mlenv.modules.losses import weighted_binary_cross_entropy
from mlenv.modules.low_rank_cross_net import LowRankCrossNet, LowRankCrossNetConfig
from mlenv.modules.masknet import MaskNet, MaskNetConfig
from mlenv.modules.mean_pooling import MeanPooling, MeanPoolingConfig
from mlenv.modules.mixed_numbers import MixedNumbers, MixedNumbersConfig
from mlenv.modules.mlp import MLP, MLPConfig
from mlenv.modules.mmoe import MMoE, MMoEConfig
from mlenv.modules.noise_robust_losses import (
    GeneralizedCrossEntropy,
    GeneralizedCrossEntropyConfig,
    SymmetricCrossEntropy,
    SymmetricCrossEntropyConfig,
)
from mlenv.modules.normalization import NumericNormalization, NumericNormalizationConfig
from mlenv.modules.objective import Losses, Objective
from mlenv.modules.pointwise_losses import BinaryCrossEntropy, BinaryCrossEntropyConfig, FocalLoss, FocalLossConfig
from mlenv.modules.progressive_experts import ProgressiveExperts, ProgressiveExpertsConfig
from mlenv.modules.ranker import Ranker, RankerConfig
from mlenv.modules.representation import NUMBERS, Representation
from mlenv.modules.request_losses import ListwiseLoss, ListwiseLossConfig, PairwiseLoss, PairwiseLossConfig
from mlenv.modules.shared_bottom import SharedBottom, SharedBottomConfig
from mlenv.modules.summaries import Summaries, SummaryConfig
from mlenv.modules.target_attention import TargetAttention, TargetAttentionConfig
from mlenv.modules.task_balance import GradNorm, GradNormConfig, PCGrad, PCGradConfig, UncertaintyConfig, UncertaintyWeights
from mlenv.modules.trans_act import TransAct, TransActConfig

__all__ = [
    "CROSSINGS",
    "ENGINES",
    "HSTU",
    "MLP",
    "NUMBERS",
    "AffineCalibrator",
    "AutoInt",
    "AutoIntConfig",
    "BinaryCrossEntropy",
    "BinaryCrossEntropyConfig",
    "CrossNet",
    "CrossNetConfig",
    "CrossingConfig",
    "CrossingEnsemble",
    "CrossingEnsembleConfig",
    "CrossingStack",
    "CrossingStackConfig",
    "Distillation",
    "DotInteraction",
    "DotInteractionConfig",
    "EmbeddedFeatures",
    "EmbeddedSequence",
    "Embeddings",
    "EntireSpaceHeads",
    "ExpertGates",
    "ExpertNetworks",
    "FactorizationMachine",
    "FactorizationMachineConfig",
    "FakeNegativeWeightedConfig",
    "FakeNegativeWeightedLoss",
    "FeatureDropout",
    "FeatureDropoutConfig",
    "FieldNulls",
    "FieldTokens",
    "FieldTransformer",
    "FieldTransformerConfig",
    "FinalMLP",
    "FinalMLPConfig",
    "FocalLoss",
    "FocalLossConfig",
    "GatedCrossNet",
    "GatedCrossNetConfig",
    "GeneralizedCrossEntropy",
    "GeneralizedCrossEntropyConfig",
    "GradNorm",
    "GradNormConfig",
    "HSTUConfig",
    "HistogramCalibrator",
    "HistogramConfig",
    "IsotonicCalibrator",
    "IsotonicConfig",
    "ListwiseLoss",
    "ListwiseLossConfig",
    "LogisticConfig",
    "Losses",
    "LowRankCrossNet",
    "LowRankCrossNetConfig",
    "MLPConfig",
    "MMoE",
    "MMoEConfig",
    "MaskNet",
    "MaskNetConfig",
    "MeanPooling",
    "MeanPoolingConfig",
    "MixedNumbers",
    "MixedNumbersConfig",
    "NegativeSamplingConfig",
    "NumericNormalization",
    "NumericNormalizationConfig",
    "Objective",
    "PCGrad",
    "PCGradConfig",
    "PairwiseLoss",
    "PairwiseLossConfig",
    "PlattConfig",
    "ProgressiveExperts",
    "ProgressiveExpertsConfig",
    "Ranker",
    "RankerConfig",
    "Representation",
    "SegmentCalibrator",
    "SharedBottom",
    "SharedBottomConfig",
    "SourceConfig",
    "Summaries",
    "SummaryConfig",
    "SymmetricCrossEntropy",
    "SymmetricCrossEntropyConfig",
    "TargetAttention",
    "TargetAttentionConfig",
    "TaskHeads",
    "Taught",
    "TemperatureConfig",
    "TorchEmbeddings",
    "TorchRecEmbeddings",
    "TransAct",
    "TransActConfig",
    "UncertaintyConfig",
    "UncertaintyWeights",
    "gate_gauges",
    "pairwise_divergence",
    "soft_label_divergence",
    "weighted_binary_cross_entropy",
]
