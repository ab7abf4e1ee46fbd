"""How much of a model's quality hangs on each feature: what is lost when its values are dealt out among the rows anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlenv.batch import Batch
from mlenv.datasets.segments import segment_texts
from mlenv.errors import DataError
from mlenv.insight.row_sample import RowSample
from mlenv.models.bootstrap import Floats, Ints, TaskRows, resample, spread
from mlenv.models.missing_features import feature_groups
from mlenv.models.paired_scoring import codes_of_requests
from mlenv.schema import Schema

METRICS: Final = {"auc": 1.0, "normalized_entropy": -1.0}
"""What is measured, and whether more of it is better."""
CONFIDENCE: Final = 0.95
LEAST_LABELS: Final = 10
"""Labels of each kind that a segment needs."""
MOST_VALUES: Final = 20
"""Values of a segment column that are looked at, those with the most rows."""

_BATCH_ROWS: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What a task loses without a feature, or without several at once."""

    feature: str
    """Or the name of a group."""
    is_group: bool
    task: str
    metric: str
    """A key of ``METRICS``."""
    segment: str
    """``column=value``; empty for all rows."""
    loss: float
    """Mean over the repeats; positive where the model is worse with dealt-out values."""
    deviation: float
    """Standard deviation over the repeats."""
    low: float
    high: float
    """Interval of the loss, from requests and repeats drawn anew; nan where it cannot be told."""

    @property
    def is_clear(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low > 0


@dataclass(frozen=True)
class Slice:
    """Rows of one task, and what they are divided by."""

    task: int
    places: Ints
    """In the sample, of the rows that count."""
    rows: TaskRows
    """The same rows, without predictions."""
    names: Sequence[str]
    """``column=value``, or one empty name for all rows."""
    groups: Ints
    """``(rows,)``, places in ``names``."""


def groups_to_permute(schema: Schema, chosen: Sequence[str] = ()) -> dict[str, frozenset[str]]:
    """Each feature by itself, and all of an entity together, by name; with a choice, these features only."""
    single = {name: frozenset({name}) for name in chosen or schema.features}
    return single if chosen else single | {name: some for name, some in feature_groups(schema).items() if name.endswith(" features")}


def permutations(num_rows: int, num_repeats: int, seed: int) -> list[Ints]:
    """Orders of the rows; all features are dealt out in the same ones, so that they are compared on equal terms."""
    random = np.random.default_rng(seed)
    return [random.permutation(num_rows) for _ in range(num_repeats)]


def permutation_importance(
    predict: Callable[[Batch], Tensor],
    sample: RowSample,
    features: Mapping[str, frozenset[str]],
    orders: Sequence[Ints],
    *,
    segments: Sequence[str] = (),
    num_draws: int = 100,
) -> tuple[list[Importance], list[str]]:
    """
    Args:
        predict: gives predictions, ``(batch, tasks)``, such as a ``StoredScorer``.
        features: what is dealt out together, by name.
        orders: by which rows take the values of others, one for each repeat; two or more.
        segments: columns of the metadata.

    Returns:
        What was lost, and in words what could not be measured.

    Raises:
        DataError: there are not enough labels for any task.

    Source: Breiman, "Random Forests", Machine Learning 2001, section 10; Fisher, Rudin and Dominici, "All Models are Wrong, but Many are
    Useful", JMLR 2019, arXiv:1801.01489.
    """
    slices, notes = _slices(sample, segments)
    whole = _measure(_score(predict, sample), slices, num_draws)
    found: list[Importance] = []
    for name, some in features.items():
        repeats = [_measure(_score(predict, sample, some, order), slices, num_draws) for order in orders]
        found += _losses(name, len(some) > 1, sample.schema.tasks, slices, whole, repeats)
    return found, notes


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; nan for fewer than two, or where one of them is constant."""
    from scipy.stats import rankdata

    ranks = rankdata(first), rankdata(second)
    if len(first) < 2 or any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


_Measured = list[dict[str, tuple[Floats, Floats]]]
"""By slice and metric: the values, ``(groups,)``, and those of the draws, ``(draws, groups)``."""


def _score(
    predict: Callable[[Batch], Tensor], sample: RowSample, features: frozenset[str] = frozenset(), order: Ints | None = None
) -> Floats:
    places = None if order is None else torch.from_numpy(order)
    parts = [predict(batch) for batch in sample.batches(_BATCH_ROWS, features, places)]
    predictions: Floats = torch.cat(parts).double().numpy()
    return predictions


def _slices(sample: RowSample, segments: Sequence[str]) -> tuple[list[Slice], list[str]]:
    assert sample.metadata is not None
    requests = codes_of_requests(sample.metadata, sample.schema.request)
    slices, notes = [], []

    def add(task: int, places: Ints, names: Sequence[str], groups: Ints) -> None:
        labels, weights = (values[places, task].double().numpy() for values in (sample.labels, sample.weights))
        rows = TaskRows(labels, weights, (), requests[places], int(requests.max()) + 1)
        slices.append(Slice(task, places, rows, names, groups))

    for number, task in enumerate(sample.schema.tasks):
        counted = np.flatnonzero(sample.weights[:, number].numpy() > 0)
        labels = sample.labels[counted, number].numpy()
        if problem := _too_few(labels):
            notes.append(f"{task}: {problem} in the sample")
            continue
        add(number, counted, [""], np.zeros(len(counted), np.int64))
        for column in segments:
            values, codes = _segment(sample.metadata, column, counted)
            names: list[str] = []
            groups = np.full(len(counted), -1)
            sizes = np.bincount(codes, minlength=len(values))
            for value in np.argsort(-sizes, kind="stable")[:MOST_VALUES]:
                if problem := _too_few(labels[codes == value]):
                    notes.append(f"{task}, {column}={values[value]}: {problem}")
                    continue
                groups[codes == value] = len(names)
                names.append(f"{column}={values[value]}")
            if len(values) > MOST_VALUES:
                notes.append(f"{task}, {column}: only the {MOST_VALUES} largest of {len(values)} values are measured")
            if names:
                add(number, counted[groups >= 0], names, groups[groups >= 0])
    if not slices:
        fix = "ask about more rows, or about other days"
        raise DataError("rows of the sample", expected="labels of both kinds for one task at least", received="; ".join(notes), fix=fix)
    return slices, notes


def _too_few(labels: NDArray[np.float32]) -> str:
    """Why nothing can be measured on these labels; empty when it can."""
    positives = int((labels > 0.5).sum())
    negatives = len(labels) - positives
    if not len(labels):
        return "no labels"
    if not positives or not negatives:
        return f"only {'negative' if not positives else 'positive'} labels ({len(labels):,})"
    return f"only {positives:,} positive and {negatives:,} negative labels" if min(positives, negatives) < LEAST_LABELS else ""


def _segment(metadata: pa.Table, column: str, rows: Ints) -> tuple[list[str], Ints]:
    texts = segment_texts(metadata.to_batches()[0], column).take(pa.array(rows)).fill_null("null").dictionary_encode()
    return texts.dictionary.to_pylist(), texts.indices.to_numpy().astype(np.int64)


def _measure(predictions: Floats, slices: Sequence[Slice], num_draws: int) -> _Measured:
    """The same requests are drawn for whatever predictions, so that draws can be subtracted from one another."""
    measured: _Measured = []
    for one in slices:
        rows = replace(one.rows, predictions=(predictions[one.places, one.task],))
        found = resample(rows, one.groups, len(one.names), num_draws=num_draws)
        measured.append({metric: (found[metric].values[0], found[metric].draws[:, 0]) for metric in METRICS})
    return measured


def _losses(
    name: str, is_group: bool, tasks: Sequence[str], slices: Sequence[Slice], whole: _Measured, repeats: Sequence[_Measured]
) -> Iterator[Importance]:
    bound = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    for number, one in enumerate(slices):
        for metric, sign in METRICS.items():
            values = sign * np.stack([whole[number][metric][0] - repeat[number][metric][0] for repeat in repeats])
            draws = sign * np.stack([whole[number][metric][1] - repeat[number][metric][1] for repeat in repeats], axis=1)
            # A draw of requests meets a draw of repeats: the mean moves with both.
            drawn = np.random.default_rng(0).integers(0, len(repeats), draws.shape[:2])
            mean_draws = np.take_along_axis(draws, drawn[:, :, None], axis=1).mean(axis=1)
            half = bound * spread(mean_draws)
            means, deviations = values.mean(axis=0), values.std(axis=0)
            for place, segment in enumerate(one.names):
                yield Importance(
                    feature=name,
                    is_group=is_group,
                    task=tasks[one.task],
                    metric=metric,
                    segment=segment,
                    loss=float(means[place]),
                    deviation=float(deviations[place]),
                    low=float(means[place] - half[place]),
                    high=float(means[place] + half[place]),
                )
