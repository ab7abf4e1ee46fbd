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
    def advance(self, batches, progress):
        assert progress.position == Position(row=progress.step)
        place = next(batches, None)
        return None if place is None else StepOutput(4, Position(row=place + 1), torch.zeros(1), torch.ones(1))


class Run:
    def __init__(self, progress=None, monitored=(), stop_at=None):
        self.events, self.progress, self.monitored, self.stop_at = [], progress or Progress(), list(monitored), stop_at

    def restore(self):
        return self.progress

    def log(self, progress, output):
        self.events.append(("log", progress.step))

    def evaluate(self, progress):
        self.events.append(("evaluate", progress.step))
        return progress.judged(self.monitored.pop(0), higher_is_better=True) if self.monitored else progress

    def save(self, progress):
        self.events.append(("save", progress.step))

    def must_stop(self, progress):
        return progress.step == self.stop_at

    def finish(self, progress):
        if progress.step > self.progress.step and ("save", progress.step) not in self.events:
            self.save(progress)


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


def test_it_stops_when_the_monitor_gets_no_better_and_stays_stopped():
    config = LoopConfig(evaluate_every_steps=2, checkpoint_every_steps=3, monitor="click/auc", stop_after_evaluations=2)
    run = Run(monitored=[0.5, 0.4, 0.6, 0.6, 0.6, 0.9])
    progress = fit(Step(), Source(), run, config)
    assert progress == Progress(10, 40, Position(row=10), best=0.6, stale_evaluations=2, decays=3)
    assert run.events[-2:] == [("evaluate", 10), ("save", 10)]
    again = Run(progress)
    assert fit(Step(), Source(), again, config) == progress
    assert again.events == []


def test_a_run_that_must_stop_is_evaluated_where_it_is_due_and_saved():
    run = Run(stop_at=4)
    assert fit(Step(), Source(), run, LoopConfig(evaluate_every_steps=2, checkpoint_every_steps=3)).step == 4
    assert run.events[-3:] == [("log", 4), ("evaluate", 4), ("save", 4)]


def test_a_better_monitor_is_one_that_gains_more_than_rounding():
    progress = Progress().judged(0.5, higher_is_better=True)
    assert (progress.best, progress.stale_evaluations) == (0.5, 0)
    assert progress.judged(0.5 + 5e-7, higher_is_better=True).stale_evaluations == 1
    assert progress.judged(0.5 + 2e-6, higher_is_better=True).best == 0.5 + 2e-6
    assert progress.judged(0.4, higher_is_better=False).best == 0.4
    assert progress.judged(0.6, higher_is_better=False) == Progress(best=0.5, stale_evaluations=1, decays=1)
