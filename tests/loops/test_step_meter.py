"""What the record says of a step's cost, by hand."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from mlenv.batch import START, Batch, Position, SparseFeatures
from mlenv.loops.fit import Progress
from mlenv.loops.step_meter import PEAK_TFLOPS, StepMeter, forward_flops, peak_tflops
from mlenv.loops.train_step import StepOutput

CPU = torch.device("cpu")


def batch_of(num_rows):
    targets = torch.zeros(num_rows, 1)
    sparse = SparseFeatures((), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), ())
    return Batch(sparse, torch.zeros(num_rows, 3), targets, targets, Position(row=num_rows))


class Model(nn.Module):
    """3 -> 5 -> 1, with a layer that counts what it sees."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1))

    def forward(self, batch):
        return self.layers(batch.dense)


class Step:
    """Takes one batch and a while."""

    def advance(self, batches, progress):
        batch = next(batches, None)
        time.sleep(0.02)
        return None if batch is None else StepOutput(len(batch), batch.position, torch.zeros(1), torch.zeros(1))


def slow(sizes):
    for size in sizes:
        time.sleep(0.06)
        yield batch_of(size)


def test_operations_of_a_forward_pass_are_those_of_its_products_and_nothing_changes():
    model = Model()
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    assert forward_flops(model, batch_of(4)) == 2 * 4 * (3 * 5 + 5 * 1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_gauges_of_a_few_steps():
    meter = StepMeter(Step(), Model(), CPU, batch_of(2), peak=1e-6)
    batches, started = slow([4, 4, 2]), time.perf_counter()
    outputs = [meter.advance(batches, Progress()) for _ in range(4)]
    assert [output and output.num_examples for output in outputs] == [4, 4, 2, None]
    seconds = time.perf_counter() - started
    gauges = meter.gauges()
    work = 3 * 2 * (3 * 5 + 5 * 1) * 10 / 1e12
    assert work / seconds <= gauges["tflops_per_second"] <= work / 0.2
    assert gauges["model_flops_utilization"] == pytest.approx(gauges["tflops_per_second"] / 1e-6)
    assert 0.12 / seconds <= gauges["data_wait_share"] <= 0.7
    assert meter.gauges()["tflops_per_second"] == 0  # since the last time
    assert [meter.advance(slow([size]), Progress()).num_examples for size in (3, 2)] == [3, 2]  # other trainings


def test_a_rank_without_rows_counts_its_filler():
    meter = StepMeter(Step(), Model(), CPU, batch_of(2), peak=None)
    assert meter.advance(iter([]), Progress(position=START)) is None
    assert meter.gauges().keys() == {"data_wait_share", "tflops_per_second"}


def test_the_peak_is_that_of_the_device_or_what_the_user_says(monkeypatch):
    assert peak_tflops(CPU, "32-true", None) is None
    assert peak_tflops(CPU, "32-true", 0.3) == 0.3
    named = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA A10G": 70.0, "NVIDIA L4": 121.0, "Tesla T4": 8.1}
    for name, peak in {**named, "GeForce": None}.items():
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device, name=name: name)
        assert peak_tflops(torch.device("cuda"), "bf16-mixed", None) == peak
    parts = list(PEAK_TFLOPS)
    assert not [(early, late) for place, early in enumerate(parts) for late in parts[place + 1 :] if early in late]
