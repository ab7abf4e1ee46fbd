"""Threads that work ahead, and errors that cross processes. The tests of the source hold the rows."""

from __future__ import annotations

import threading
from itertools import count

import pytest

from mlenv.datasets.workers import ThreadsConfig
from mlenv.errors import ConfigError, DataError, Problems


def test_results_come_in_order_and_no_more_ahead_than_there_are_threads():
    looked_at = []

    def items():
        for item in count():
            looked_at.append(item)
            yield item

    first_waits = threading.Event()

    def work(item):
        if item == 0:
            first_waits.wait(10)  # the second is ready before it
        else:
            first_waits.set()
        return item * 10

    results = ThreadsConfig(num_threads=3).build().map(work, items())
    assert looked_at == []
    for taken in range(1, 6):
        assert next(results) == (taken - 1) * 10
        assert looked_at == list(range(taken + 3))
    results.close()
    assert looked_at == list(range(8))


def test_an_error_is_raised_in_its_place():
    def work(item):
        if item == 2:
            raise DataError("part-0.parquet", expected="rows", received=item)
        return item

    results = ThreadsConfig(num_threads=2).build().map(work, range(9))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(DataError, match=r"part-0\.parquet: expected rows\. Received: 2\."):
        next(results)


def test_errors_cross_processes_as_they_are():
    cloudpickle = pytest.importorskip("ray").cloudpickle
    error = DataError("part-0.parquet, row 3", expected="an id", received=7, fix="hash it")
    for sent in (error, Problems("config", [error, ConfigError("seed", expected="a number", received="x")])):
        came = cloudpickle.loads(cloudpickle.dumps(sent))
        assert type(came) is type(sent)
        assert str(came) == str(sent)
        assert came.__dict__.keys() == sent.__dict__.keys()
    assert cloudpickle.loads(cloudpickle.dumps(error)).under("train").place == "train.part-0.parquet, row 3"


def test_a_number_of_threads_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"num_threads: expected a number >= 1\. Received: 0\."):
        ThreadsConfig(num_threads=0)
