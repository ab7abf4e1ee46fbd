"""Data that cannot be used, as a user meets it: one message that names file and place, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlenv.cli import main
from mlenv.errors import DONE, GATE, WRONG_INPUT

CONFIG = """
name: small
output: {folder}/out
schema:
  features:
    price: {{kind: numeric}}
    country: {{kind: categorical, storage: string, table: country}}
    item: {{kind: categorical, table: item}}
  tables:
    country: {{num_embeddings: 10, embedding_dim: 4, ids: hash}}
    item: {{num_embeddings: 100, embedding_dim: 4, ids: hash}}
  labels: {{click: {{}}}}
  row_key: [key]
data:
  path: {folder}/data
  batch_size: 32
  train: {{start: 2026-01-01, end: 2026-01-03}}
  test: {{start: 2026-01-04, end: 2026-01-04}}
model: {{kind: ranker}}
tracking: {{enabled: false}}
"""
TRAIN, DRY_RUN, VALIDATE, VALIDATE_TRAIN = ("train",), ("train", "--dry-run"), ("validate",), ("validate", "--window", "train")
SECOND = "date=2026-01-02/part.parquet"
SKIP = ("data.on_bad_file=skip", "data.max_bad_row_groups=1")


def day(number, **changes):
    generator = np.random.default_rng(number)
    columns = {
        "key": np.arange(200) + 200 * number,
        "item": generator.integers(0, 50, 200),
        "country": generator.choice(["se", "de"], 200),
        "price": generator.random(200),
        "click": generator.integers(0, 2, 200),
    }
    return pa.table(columns | changes)


class Data:
    """Four days, and a config for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for number in range(1, 5):
            self.write(number, day(number))
        (folder / "config.yaml").write_text(CONFIG.format(folder=folder))

    def file(self, number: int) -> Path:
        return self.folder / f"data/date=2026-01-0{number}/part.parquet"

    def write(self, number: int, table: pa.Table) -> None:
        self.file(number).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, self.file(number), row_group_size=64)

    def damage(self, number: int, group: int) -> None:
        content = bytearray(self.file(number).read_bytes())
        column = pq.read_metadata(self.file(number)).row_group(group).column(1)
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + 12] = b"\xff" * 12
        self.file(number).write_bytes(content)

    def run(self, command: tuple[str, ...], *settings: str) -> int:
        verb, *options = command
        return main([verb, str(self.folder / "config.yaml"), *options, *(setting.format(folder=self.folder) for setting in settings)])


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def transform(text: str) -> str:
    return f"data.transforms=[{text}]"


def without_price(data: Data) -> None:
    data.write(2, day(2).drop_columns(["price"]))


def repeated_keys(data: Data) -> None:
    pq.write_table(pa.table({"item": [1, 1, 2], "extra": [1.0, 2.0, 3.0]}), data.folder / "side.parquet")


def two_damaged(data: Data) -> None:
    data.damage(2, 1)
    data.damage(3, 0)


EVERY = (DRY_RUN, TRAIN, VALIDATE, VALIDATE_TRAIN)
READING = (TRAIN, VALIDATE, VALIDATE_TRAIN)
JOIN = (
    transform("{{kind: join, table: {folder}/side.parquet, key: [item], columns: [extra]}}"),
    "schema.features.extra={{kind: numeric}}",
)
STRATIFY = transform("{{kind: stratify, columns: [country], shares: {{fr: 0.5, se: 0.5}}, when: always}}")
CASES = {
    "unknown column": (
        None,
        (transform('{{kind: filter, where: "prise > 1"}}'),),
        EVERY,
        "part.parquet, data.transforms[0].where: expected columns of the data. Received: 'prise'. Fix: did you mean 'price'",
    ),
    "wrong types": (
        None,
        (transform('{{kind: derive, column: x, sql: "country + 1"}}'),),
        EVERY,
        "part.parquet, data.transforms[0].sql: expected an expression of matching types. Received: 'country + 1'",
    ),
    "repeated keys of a join": (
        repeated_keys,
        JOIN,
        READING,
        "mlenv: {folder}/side.parquet: expected one row for each item. Received: 'several for item 1'",
    ),
    "an empty file of a day": (
        lambda data: data.write(2, day(2).slice(0, 0)),
        (),
        (TRAIN,),
        "{folder}/data: expected rows on every day of 2026-01-01 to 2026-01-03. Received: 'no rows on 2026-01-02'",
    ),
    "a day without files": (
        lambda data: shutil.rmtree(data.file(2).parent),
        (),
        (TRAIN,),
        "{folder}/data: expected rows on every day of 2026-01-01 to 2026-01-03. Received: 'no rows on 2026-01-02'",
    ),
    "a file of no bytes": (
        lambda data: data.file(2).write_bytes(b""),
        (),
        EVERY,
        f"{SECOND}: expected a whole Parquet file. Received: 'Parquet file size is 0 bytes'",
    ),
    "a column of later files alone": (
        lambda data: [data.write(number, day(number, more=np.ones(200))) for number in (2, 3, 4)],
        ("schema.features.more={{kind: numeric}}",),
        (DRY_RUN, TRAIN, VALIDATE_TRAIN),
        "date=2026-01-01/part.parquet, column 'more': expected a column of this name. Received: 'none'",
    ),
    "a column missing from a file": (
        without_price,
        (),
        EVERY,
        f"{SECOND}, column 'price': expected a column of this name. Received: 'none'",
    ),
    "texts among integers": (
        lambda data: data.write(2, day(2, item=["a"] * 200)),
        (),
        EVERY,
        f"{SECOND}, column 'item': expected int64. Received: 'string'",
    ),
    "a row group that cannot be read": (
        lambda data: data.damage(2, 1),
        (),
        READING,
        f"{SECOND}, row group 1: expected readable pages. Received: ",
    ),
    "more of them than may be passed over": (
        two_damaged,
        SKIP,
        READING,
        "{folder}/data: expected at most 1 row groups that cannot be read, data.max_bad_row_groups. Received: ",
    ),
    "a truncated footer": (
        lambda data: data.file(2).write_bytes(data.file(2).read_bytes()[:-6]),
        (),
        EVERY,
        f"{SECOND}: expected a whole Parquet file. Received: 'Parquet magic bytes not found in footer",
    ),
    "no row left": (
        None,
        (transform('{{kind: filter, where: "price > 5"}}'),),
        READING,
        "{folder}/data: expected rows that data.transforms leave in 2026-01-0",
    ),
    "a share of a value that no row has": (
        None,
        (STRATIFY,),
        READING,
        "mlenv: data.transforms[0].shares.fr: expected rows with this value of country. Received: 'none'",
    ),
    "a window without days": (
        None,
        ("data.test={{start: 2027-01-01, end: 2027-01-02}}",),
        (TRAIN, VALIDATE),
        "{folder}/data: expected Parquet files in 2027-01-01 to 2027-01-02. Received: 'days 2026-01-01 to 2026-01-04'",
    ),
    "a window of empty files": (
        lambda data: data.write(4, day(4).slice(0, 0)),
        (),
        (DRY_RUN, TRAIN, VALIDATE),
        "{folder}/data: expected rows in 2026-01-04 to 2026-01-04. Received: 'empty files only'",
    ),
}


@pytest.mark.parametrize(("case", "command"), [(case, command) for case, entry in CASES.items() for command in entry[2]])
def test_bad_input_is_refused_in_one_message(data, capsys, case, command):
    prepare, settings, _, message = CASES[case]
    if prepare is not None:
        prepare(data)
    before = sorted(data.folder.rglob("*"))
    extra = ("--out", str(data.folder / "page")) if command[0] == "validate" else ()
    assert data.run((*command, *extra), *settings) == WRONG_INPUT
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("mlenv: ") == 1
    assert output.err.count("expected ") == 1
    assert message.replace("{folder}", str(data.folder)) in output.err
    assert sorted(data.folder.rglob("*")) == before


@pytest.mark.parametrize("command", [DRY_RUN, TRAIN, VALIDATE_TRAIN])
@pytest.mark.parametrize(
    "changes",
    [
        {"more": np.ones(200)},
        {"item": pa.array(np.arange(200) % 50, pa.int32())},
        {"country": pa.array(["se", "de"] * 100).dictionary_encode()},
        {"price": pa.array(np.ones(200), pa.float32())},
    ],
    ids=["a new column", "int32 beside int64", "dictionary beside string", "float beside double"],
)
def test_files_may_differ_in_what_means_the_same(data, capsys, changes, command):
    data.write(3, day(3, **changes))
    assert data.run(command, "checks.psi={{warn: null, fail: null}}", "loop.max_steps=2") in (
        DONE,
        GATE if command[0] == "validate" else DONE,
    )
    assert "mlenv: " not in capsys.readouterr().err


def test_what_was_passed_over_is_counted_and_recorded(data, capsys, caplog):
    data.damage(2, 1)
    passed_over = f"{data.file(2)}, row group 1, 64 rows"
    assert data.run((*VALIDATE_TRAIN, "--out", str(data.folder / "page")), *SKIP) == DONE
    plain = json.loads((data.folder / "page/validation.json").read_text())
    assert (plain["passed over"], plain["rows"]) == (passed_over, "536")
    assert passed_over in (data.folder / "page/validation.html").read_text()
    assert data.run(TRAIN, *SKIP, "loop.max_steps=2") == DONE
    assert passed_over in (data.folder / "out/report.html").read_text()
    assert "passed over" in caplog.text
    caplog.clear()
    data.file(3).write_bytes(b"PAR1")
    assert data.run(DRY_RUN, *SKIP) == DONE  # a dry run reads footers alone
    assert f"passed over: {data.file(3)}: expected a whole Parquet file" in caplog.text


def test_an_empty_day_is_a_finding_of_a_validation(data, capsys):
    data.write(2, day(2).slice(0, 0))
    assert data.run(VALIDATE_TRAIN) == GATE
    assert "FAIL  missing_days           2026-01-02" in capsys.readouterr().out


PRICE = "    price: {kind: numeric}\n"
COUNTRY = "    country: {kind: categorical, storage: string, table: country}\n"
ITEM = "    item: {kind: categorical, table: item}\n"


def write_baseline(data: Data, features: str) -> None:
    """Statistics of the test window under a schema with these features, in the folder ``other``."""
    config = (data.folder / "config.yaml").read_text()
    (data.folder / "other.yaml").write_text(config.replace(PRICE + COUNTRY + ITEM, features))
    assert main(["validate", str(data.folder / "other.yaml"), "--out", str(data.folder / "other")]) == DONE


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            PRICE.replace("numeric", "categorical, column: item, table: item") + COUNTRY + ITEM,
            ", feature 'price': expected statistics with numbers. Received: 'with values'",
        ),
        (
            COUNTRY.replace("country:", "land:", 1).replace("}", ", column: country}")
            + ITEM.replace("item:", "thing:", 1).replace("}", ", column: item}"),
            ": expected statistics of price, country, item. Received: 'statistics of land, thing'",
        ),
    ],
)
def test_a_baseline_of_another_schema_is_refused(data, capsys, features, message):
    write_baseline(data, features)
    capsys.readouterr()
    before = sorted(data.folder.rglob("*"))
    for command, more in (
        (("validate", "--baseline", str(data.folder / "other"), "--out", str(data.folder / "page")), ()),
        (TRAIN, ("checks.before_training=true", "checks.baseline={folder}/other")),
    ):
        assert data.run(command, *more) == WRONG_INPUT
        error = capsys.readouterr().err
        assert f"mlenv: {data.folder}/other{message}" in error
        assert sorted(data.folder.rglob("*")) == before


def test_features_that_the_baseline_lacks_are_named(data):
    write_baseline(data, COUNTRY + ITEM)
    assert data.run(("validate", "--baseline", str(data.folder / "other"), "--out", str(data.folder / "page"))) == DONE
    assert json.loads((data.folder / "page/validation.json").read_text())["not in the baseline"] == "price"
