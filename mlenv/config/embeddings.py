"""How embedding tables are held, trained and divided: ``embeddings`` of a config."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Literal

from mlenv.errors import ConfigError, check_above, check_at_least, placed_under

TableOptimizer = Literal["row_wise_adagrad", "adam", "sgd"]
Sharding = Literal["table_wise", "row_wise", "column_wise"]
"""Each table whole on one process; its rows divided over all; its columns divided over all."""


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """How one table is trained where it is not trained like all others; what is null is taken from ``embeddings``."""

    optimizer: TableOptimizer | None = None
    """With another optimizer than that of ``embeddings`` the learning rate must be named, because rates do not carry over."""
    learning_rate: float | None = None
    """Before warm-up and decay."""
    eps: float | None = None
    """See ``embeddings.eps``; sgd takes none."""
    weight_decay: float | None = None
    """See ``embeddings.weight_decay``; 0 spares the table where others have a penalty."""
    sharding: Sharding | None = None
    """How the engine torchrec divides the table over processes; null leaves it to TorchRec's planner."""

    def __post_init__(self) -> None:
        if self.learning_rate is not None:
            check_above("learning_rate", self.learning_rate, 0)
        for name in ("eps", "weight_decay"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class EmbeddingsConfig:
    """Which engine holds the tables. Both have the same table names, logits and training curve."""

    engine: Literal["torch", "torchrec"] = "torch"
    """torch: plain tables, everywhere, exportable; torchrec: fused update and sharding over ranks."""
    optimizer: TableOptimizer = "row_wise_adagrad"
    """row_wise_adagrad and sgd touch the rows that a step looks up; adam every row at every step, which only small tables can afford."""
    init_std: float = 0.01
    """Standard deviation of the initial rows, normal around zero."""
    learning_rate: float = 0.02
    """Of row-wise Adagrad, which keeps one accumulator per row (Duchi et al. 2011; Mudigere et al. 2022, arXiv:2104.05158), of Adam
    or of plain gradient descent."""
    eps: float = 1e-8
    """Added to the root of the accumulator, or of Adam's second moment; sgd has none."""
    weight_decay: float = 0.0
    """L2 penalty: this times a row is added to its gradient; of the rows that a step looks up, under adam of all rows; sgd has none."""
    sharding: Sharding | None = None
    """How the engine torchrec divides tables over processes; null leaves it to TorchRec's planner. column_wise wants sgd."""
    communication_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """In what the engine torchrec sends vectors between processes; tables stay float32. Their gradients go in bf16 under either of the
    others, but on a CPU, which sends no bf16, in fp32."""
    tables: dict[str, TableConfig] = field(default_factory=dict)
    """What is different for a table, by its name in ``schema.tables``."""

    def __post_init__(self) -> None:
        check_above("learning_rate", self.learning_rate, 0)
        for name in ("init_std", "eps", "weight_decay"):
            check_at_least(name, getattr(self, name), 0)
        if self.optimizer == "sgd" and self.weight_decay:
            raise ConfigError("weight_decay", expected="0 under sgd", received=self.weight_decay)
        for name, table in self.tables.items():
            other = table.optimizer not in (None, self.optimizer)
            if other and table.learning_rate is None:
                expected = f"a number, because {table.optimizer} takes another rate than {self.optimizer}"
                raise ConfigError(f"tables.{name}.learning_rate", expected=expected, received=None)
            with placed_under(f"tables.{name}"):
                if self.of(name).optimizer == "sgd" and table.eps is not None:
                    raise ConfigError("eps", expected="null, because sgd has none", received=table.eps)

    def of(self, table: str) -> EmbeddingsConfig:
        """The same with what is different for a table in place, and without a word about others."""
        different = dataclasses.asdict(self.tables.get(table, TableConfig()))
        return replace(self, tables={}, **{name: value for name, value in different.items() if value is not None})
