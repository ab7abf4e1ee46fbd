"""Beginning with the weights of another training: ``warm_start`` of a config."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlenv.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """What a new training takes over. Tensors go by name and shape, rows of tables by the id that they stand for."""

    checkpoint: str
    """Output folder of a training, one of its checkpoints, or a model in MLflow: ``runs:/RUN/model`` or ``models:/NAME@ALIAS``."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Tables of this config and the names that they had there."""
    optimizer_state: bool = False
    """Take the optimizers' state of what is taken as well, such as the sums of Adagrad: frequent rows go on with small steps."""
    strict: bool = False
    """Refuse a checkpoint that has a tensor of the model in another shape, or its ids in other rows that cannot be told."""

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("checkpoint", expected="a checkpoint", received="", fix="name one, or take warm_start out")
        repeated = {old for old in self.renamed.values() if list(self.renamed.values()).count(old) > 1}
        if repeated:
            raise ConfigError("renamed", expected="each old name once", received=sorted(repeated))
