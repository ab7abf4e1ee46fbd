from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlenv.errors import ConfigError
from mlenv.serving.served_log import ServedLog

KEYS = pa.RecordBatch.from_pydict({"impression_id": [1, None]})
ROWS = pa.RecordBatch.from_pydict({"item_id": [7, None], "tags": [["a"], []]})
PREDICTIONS = np.array([[0.25], [0.5]], np.float32)


def test_files_are_whole_and_hold_values_and_predictions(tmp_path):
    log = ServedLog(tmp_path / "log", ("click",), file_rows=4)
    log.add("first", KEYS, ROWS, PREDICTIONS)
    assert not list((tmp_path / "log").iterdir())
    log.add("second", KEYS, ROWS, PREDICTIONS)
    (file,) = (tmp_path / "log").iterdir()
    assert pq.read_table(file).drop(["served_at"]).to_pydict() == {
        "served_request_id": ["first", "first", "second", "second"],
        "served_row": [0, 1, 0, 1],
        "impression_id": [1, None, 1, None],
        "item_id": [7, None, 7, None],
        "tags": [["a"], [], ["a"], []],
        "prediction_click": [0.25, 0.5, 0.25, 0.5],
    }
    log.add("third", KEYS, ROWS, PREDICTIONS)
    log.close()
    log.close()
    assert sorted(pq.read_metadata(file).num_rows for file in (tmp_path / "log").iterdir()) == [2, 4]


def test_a_file_is_due_after_a_time(tmp_path):
    log = ServedLog(tmp_path / "log", ("click",), file_seconds=0)
    log.add("first", KEYS, ROWS, PREDICTIONS)
    assert len(list((tmp_path / "log").iterdir())) == 1


def test_a_folder_that_is_gone_costs_the_rows_and_no_answer(tmp_path, caplog):
    log = ServedLog(tmp_path / "log", ("click",), file_rows=2)
    (tmp_path / "log").rmdir()
    with caplog.at_level(logging.WARNING):
        log.add("first", KEYS, ROWS, PREDICTIONS)
    assert "1 requests are not in the log" in caplog.text
    with pytest.raises(ConfigError, match="--log"):
        ServedLog(tmp_path / "no" / "log", ("click",))
