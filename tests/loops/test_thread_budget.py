from __future__ import annotations

import os

import pytest

from mlenv.loops.thread_budget import available_cores, compute_threads


@pytest.mark.parametrize(
    ("cores", "num_processes", "decode_threads", "expected"),
    [
        (2, 1, 2, 2),
        (4, 1, 2, 4),
        (8, 1, 2, 6),
        (16, 1, 2, 14),
        (16, 2, 2, 6),
        (16, 1, 0, 16),
        (2, 4, 2, 1),
    ],
)
def test_decoding_has_cores_of_its_own_where_there_are_many(cores, num_processes, decode_threads, expected):
    assert compute_threads(cores, num_processes=num_processes, decode_threads=decode_threads) == expected


def test_cores_are_those_of_the_affinity_without_a_quota(tmp_path):
    assert available_cores(tmp_path) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("text", "expected"), [("max 100000", None), ("100000 100000", 1), ("50000 100000", 1), ("99900000 100000", None)])
def test_a_container_may_use_its_quota(tmp_path, text, expected):
    (tmp_path / "cpu.max").write_text(text)
    assert available_cores(tmp_path) == (expected or len(os.sched_getaffinity(0)))


def test_quota_of_an_older_control_group(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert available_cores(tmp_path) == 1
