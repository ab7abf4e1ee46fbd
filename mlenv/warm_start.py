"""Weights of another training for one that begins: what is taken, what is not, and why."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mlenv.composition import from_plain
from mlenv.config import WarmStartConfig
from mlenv.errors import ConfigError, nearest
from mlenv.inference.stored_model import find_checkpoint, fingerprint_of
from mlenv.loops.checkpoint import load_tensors, stored_shapes, verify
from mlenv.loops.ranks import objects_of_all
from mlenv.loops.training_run import CONFIG
from mlenv.schema import Schema, Table

logger = logging.getLogger(__name__)

WARM_START: Final = "warm_start.json"
KEY: Final = "warm_start"
OPTIMIZER: Final = "optimizer."
OBJECTIVE_STATE: Final = "optimizer.objective."
"""Stays behind with the objective, which begins anew."""
_TABLE: Final = re.compile(r"(?<=\btables\.)([^.]+)(?=\.weight\b)")
"""The table in the name of a tensor, ``embeddings.tables.item.weight``, or of its optimizer's state."""


@dataclass(kw_only=True)
class Difference:
    """What a training took from another one, by the names of its own tensors."""

    checkpoint: str
    fingerprint: str
    taken: list[str] = field(default_factory=list)
    """Whole."""
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    """Tables of which some rows were taken: how many, how many are new, and how many are gone."""
    changed: dict[str, str] = field(default_factory=dict)
    """Tensors that both have and that could not be taken: why. They start fresh."""
    fresh: list[str] = field(default_factory=list)
    """Tensors that are not there."""
    left: list[str] = field(default_factory=list)
    """Tensors there that nothing here has the name of."""

    inputs: str = ""
    """How the features differ. Layers that take them side by side go by name and shape, and do not know which is which."""

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} tensors taken whole"]
        parts += [f"{name}: {of['taken']:,} rows taken, {of['new']:,} new, {of['gone']:,} gone" for name, of in self.rows.items()]
        parts += [f"{name} starts fresh: {why}" for name, why in self.changed.items()]
        parts += [f"fresh, for they are not there: {', '.join(self.fresh)}"] if self.fresh else []
        parts += [f"left there: {', '.join(self.left)}"] if self.left else []
        parts += [f"features {self.inputs}"] if self.inputs else []
        return "; ".join(parts)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


@dataclass(frozen=True)
class Rows:
    """Rows of a table that stand for the same ids as rows of another one."""

    new: Tensor
    old: Tensor


class WarmStart:
    """A checkpoint to begin with.

    Raises:
        ConfigError: there is no such checkpoint, or it has no table of a name in ``renamed``.
    """

    def __init__(self, config: WarmStartConfig, schema: Schema, tracking_uri: str) -> None:
        self._config, self._schema = config, schema
        self.checkpoint = find_checkpoint(config.checkpoint, tracking_uri, f"{KEY}.checkpoint")
        self.fingerprint = fingerprint_of(self.checkpoint)
        """A training that goes on must have begun with the same."""
        plain = OmegaConf.to_container(OmegaConf.load(self.checkpoint / CONFIG))
        assert isinstance(plain, dict)
        self._old_schema: Schema = from_plain(plain["schema"], Schema, str(self.checkpoint / CONFIG))
        for new, old in config.renamed.items():
            if old not in self._old_schema.tables:
                fix = nearest(old, self._old_schema.tables)
                raise ConfigError(f"{KEY}.renamed.{new}", expected=f"a table of {self.checkpoint}", received=old, fix=fix)

    def verify(self) -> None:
        """
        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        verify(self.checkpoint)

    def compare(self, tensors: Mapping[str, Any]) -> Difference:
        """What can be taken into these tensors of a model, and of its optimizers, on all ranks together: a rank has the state of its own
        tables alone. All ranks call this.

        Raises:
            ConfigError: ``warm_start.strict`` is set and something changed.
        """
        there, inputs = stored_shapes(self.checkpoint), _compare_inputs(self._old_schema, self._schema)
        difference = Difference(checkpoint=str(self.checkpoint), fingerprint=self.fingerprint, inputs=inputs)
        for name, tensor in self._wanted(tensors).items():
            old, rows, shape = self._old_name(name), self._rows(name), _shape(tensor)
            if old not in there:
                difference.fresh.append(name)
            elif isinstance(rows, str):
                difference.changed[name] = rows
            elif rows is not None and shape and self._has_rows(name, shape, there[old]):
                counts = {"taken": len(rows.new), "new": shape[0] - len(rows.new), "gone": there[old][0] - len(rows.old)}
                difference.rows[name] = counts
            elif (rows is not None and shape) or there[old] != shape:
                difference.changed[name] = f"shape {there[old]} there, {shape} here"
            else:
                difference.taken.append(name)
        difference = _joined(objects_of_all(difference))
        known = {self._old_name(name) for name in tensors}
        difference.left = sorted(name for name in there if name not in known and not _belongs_to_a_run(name))
        if self._config.strict and difference.changed:
            received = "; ".join(f"{name}: {why}" for name, why in difference.changed.items())
            raise ConfigError(
                f"{KEY}.strict", expected="nothing that changed", received=received, fix="set it to false to start these fresh"
            )
        return difference

    def take(self, tensors: Mapping[str, Any], difference: Difference) -> None:
        """Fills the tensors of a model with what can be taken. All ranks call this.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        load_tensors(self.checkpoint, {self._old_name(name): tensors[name] for name in difference.taken if name in tensors})
        shapes = stored_shapes(self.checkpoint)
        for name in (name for name in difference.rows if name in tensors):
            rows, old = self._rows(name), self._old_name(name)
            assert isinstance(rows, Rows)
            stored = torch.empty(shapes[old])
            load_tensors(self.checkpoint, {old: stored}, alone=True)
            fill_rows(tensors[name], rows, stored)

    def _wanted(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tensor for name, tensor in tensors.items() if self._config.optimizer_state or not name.startswith(OPTIMIZER)}

    def _old_name(self, name: str) -> str:
        return _TABLE.sub(lambda found: self._config.renamed.get(found[0], found[0]), name)

    def _rows(self, name: str) -> Rows | str | None:
        """How the rows of a table come from those there; why they cannot, or None where all are the same or it is no table."""
        found = _TABLE.search(name)
        new = None if found is None else self._schema.tables.get(found[0])
        old = None if found is None else self._old_schema.tables.get(self._config.renamed.get(found[0], found[0]))
        return None if new is None or old is None else same_rows(old, new)

    def _has_rows(self, name: str, here: tuple[int, ...], there: tuple[int, ...]) -> bool:
        """Whether both have a row, or a number, for each row of the table, of the same width."""
        table = _TABLE.search(name)
        assert table is not None
        old = self._old_schema.tables[self._config.renamed.get(table[0], table[0])]
        return here[0] == self._schema.tables[table[0]].num_embeddings and there[0] == old.num_embeddings and here[1:] == there[1:]


def _joined(differences: Sequence[Difference]) -> Difference:
    """What is so on any rank, each tensor once."""
    first = differences[0]
    return replace(
        first,
        taken=list(dict.fromkeys(name for difference in differences for name in difference.taken)),
        rows={name: rows for difference in differences for name, rows in difference.rows.items()},
        changed={name: why for difference in differences for name, why in difference.changed.items()},
        fresh=list(dict.fromkeys(name for difference in differences for name in difference.fresh)),
    )


def same_rows(old: Table, new: Table) -> Rows | str | None:
    """Rows of a table that stand for the ids of rows of an older one; None for all in their places, a text where that cannot be told.

    Ids of a vocabulary are found by name, those that are indexes by themselves; rows that ids outside are hashed into stay while they are
    as many as before.
    """
    if old.ids != new.ids:
        return f"ids: {old.ids} there, {new.ids} here"
    if old.ids == "hash":
        return (
            None if old.num_embeddings == new.num_embeddings else f"hashed into {old.num_embeddings} rows there, {new.num_embeddings} here"
        )
    if (old.vocabulary, old.num_embeddings) == (new.vocabulary, new.num_embeddings):
        return None
    if old.ids == "index":
        rows = torch.arange(min(old.num_embeddings, new.num_embeddings))
        return Rows(rows, rows)
    places = {value: place for place, value in enumerate(old.vocabulary)}
    pairs = [(place, places[value]) for place, value in enumerate(new.vocabulary) if value in places]
    spare = old.num_embeddings - len(old.vocabulary)
    if spare == new.num_embeddings - len(new.vocabulary):
        pairs += [(len(new.vocabulary) + place, len(old.vocabulary) + place) for place in range(spare)]
    return Rows(*torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1))


@torch.no_grad()
def fill_rows(tensor: Any, rows: Rows, stored: Tensor) -> None:
    """Copies rows of another table, or what an optimizer keeps of them, into those parts of a table that this rank has."""
    for piece, (row, column) in _pieces(tensor):
        here = (rows.new >= row) & (rows.new < row + len(piece))
        values = stored[rows.old[here]]
        if piece.dim() > 1:
            values = values[:, column : column + piece.shape[1]]
        piece[(rows.new[here] - row).to(piece.device)] = values.to(piece.device, piece.dtype)


def _compare_inputs(old: Schema, new: Schema) -> str:
    """Which features one of them lacks, or that they stand in another order; empty where a model reads both alike."""
    there, here = ([*(key.name for key in schema.sparse_keys), *(column.name for column in schema.dense_columns)] for schema in (old, new))
    parts = {"here alone": [name for name in here if name not in there], "there alone": [name for name in there if name not in here]}
    text = "; ".join(f"{which}: {', '.join(names)}" for which, names in parts.items() if names)
    return text or ("in another order" if there != here else "")


def _belongs_to_a_run(name: str) -> bool:
    """Whether a tensor of a checkpoint is none of the model: state of optimizers, objective and run, and weights behind an average."""
    return name.startswith((OPTIMIZER, "objective.", "random.", "run.", "trained."))


def _shape(tensor: Any) -> tuple[int, ...]:
    """Of the whole tensor, wherever its shards are."""
    return tuple(tensor.metadata().size if hasattr(tensor, "local_shards") else tensor.shape)


def _pieces(tensor: Any) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """What this rank holds of a tensor, and the row and column that each part begins at."""
    if hasattr(tensor, "local_shards"):  # TorchRec's
        parts = [(shard.tensor, shard.metadata.shard_offsets) for shard in tensor.local_shards()]
    elif isinstance(tensor, DTensor):  # FSDP's
        parts = [(tensor.to_local(), compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])]
    else:
        parts = [(tensor, (0, 0))]
    for part, offsets in parts:
        row, column = [*offsets, 0][:2]
        yield part, (row, column)
