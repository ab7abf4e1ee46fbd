"""Frappe as the benchmark split Frappe_x1: which mobile app a user opens in which context.

Source: Baltrunas et al., "Frappe: Understanding the Usage and Perception of Mobile App Recommendations In-The-Wild",
arXiv:1505.03014. The data may be used for research only and not be passed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa

from mlenv.datasets.csv_table import ID, LABEL, read_csv
from mlenv.datasets.day_partitions import write_parts

FIELDS = ("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
FILES = {"train": "train.csv.gz", "validation": "valid.csv.gz", "test": "test.csv.gz"}
"""Where each part comes from."""

UNKNOWN = 0
"""Stands for an id that no training row has."""


def convert_frappe(source: Path, out: Path) -> None:
    """Writes ``out/train``, ``out/validation`` and ``out/test``: ``row_id``, ``label`` and ten ids.

    The ids of the files run through all fields; here each field counts its own, from 1, in the order of the files' ids.

    Raises:
        DataError: a file or a column is missing or cannot be read; or ``out`` exists and is not empty, or has no parent folder.
    """
    write_parts(_parts(source), out)


def _parts(source: Path) -> Iterator[tuple[str, pa.Table]]:
    columns = {"label": LABEL, **dict.fromkeys(FIELDS, ID)}
    rows = {part: read_csv(source / file, columns) for part, file in FILES.items()}
    known = {field: rows["train"][field].unique().sort() for field in FIELDS}
    numbered = [
        pl.col(field).replace_strict(ids, range(1, len(ids) + 1), default=UNKNOWN, return_dtype=pl.Int64) for field, ids in known.items()
    ]
    for part, examples in rows.items():
        yield part, examples.with_row_index("row_id").select(pl.col("row_id").cast(pl.Int64), "label", *numbered).to_arrow()
