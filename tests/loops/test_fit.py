"""The loop alone, with a step and a run that only count."""

from __future__ import annotations

import pytest
import torch

from mlenv.batch import START, Position
from mlenv.config import LoopConfig
from mlenv.loops.fit import Progress, fit
from mlenv.loops.train_step import StepOutput


class Source:
    schema = None

    def batches(self, start=START):
        self.started_at = start
        return iter(range(start.row, 10))


class Step:
    def advance(self, batches):
        place = next(batches, None)
        return None if place is None else StepOutput(4, Position(row=place + 1), torch.zeros(1), torch.ones(1))


class Run:
    def __init__(self, progress=None):
        self.events, self.progress = [], progress or Progress()

    def restore(self):
        return self.progress

    def log(self, progress, output):
        self.events.append(("log", progress.step))

    def evaluate(self, progress):
        self.events.append(("evaluate", progress.step))

    def save(self, progress):
        self.events.append(("save", progress.step))


@pytest.mark.parametrize(
    ("max_steps", "every", "saved"),
    [(0, 4, [4, 8, 10]), (0, 5, [5, 10]), (7, 4, [4, 7]), (4, 4, [4])],
)
def test_it_runs_to_the_end_and_saves_each_state_once(max_steps, every, saved):
    run = Run()
    progress = fit(Step(), Source(), run, LoopConfig(max_steps=max_steps, checkpoint_every_steps=every))
    assert progress == Progress(saved[-1], saved[-1] * 4, Position(row=saved[-1]))
    assert [step for event, step in run.events if event == "log"] == list(range(1, saved[-1] + 1))
    assert [step for event, step in run.events if event == "save"] == saved


def test_it_continues_from_where_the_run_was():
    source, run = Source(), Run(Progress(8, 32, Position(row=8)))
    assert fit(Step(), source, run, LoopConfig()).step == 10
    assert source.started_at == Position(row=8)
    complete = Run(Progress(10, 40, Position(row=10)))
    assert fit(Step(), Source(), complete, LoopConfig()).step == 10
    assert complete.events == []


def test_it_evaluates_before_it_saves():
    run = Run()
    fit(Step(), Source(), run, LoopConfig(max_steps=4, evaluate_every_steps=2, checkpoint_every_steps=4))
    assert [event for event in run.events if event[0] != "log"] == [("evaluate", 2), ("evaluate", 4), ("save", 4)]
