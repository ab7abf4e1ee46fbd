"""A model that is compiled behind its embeddings trains as it would have, and one that cannot be compiled trains all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mlenv import Experiment, compose, fit
from mlenv.batch import example_batch
from mlenv.errors import ConfigError, Problems
from mlenv.loops.compilation import COMPILATION_FILE, owner_of_dense_part
from mlenv.loops.journal import Journal
from mlenv.loops.training_state import model_tensors

SMALL = ["model.heads.hidden=[]", "model.crossing.num_layers=1", "model.deep.hidden=[8]", "model.deep.normalization=layer"]


def trained(arguments: list[str]) -> tuple[Path, dict[str, torch.Tensor], list[float]]:
    """The output folder, the tensors at the end and the losses of the clicks. The last of the 32 batches is a short one."""
    config = compose(arguments[0], [arguments[1], *SMALL, *arguments[2:], "loop.log_every_steps=1", "data.num_epochs=1"])
    with Experiment(config) as experiment:
        assert fit(experiment.step, experiment.source("train"), experiment.run, config.loop).step == 32
        tensors = {name: tensor.detach().clone() for name, tensor in model_tensors(experiment.model).items()}
        lines = Journal(experiment.output / "metrics.jsonl").read()
        return experiment.output, tensors, [line["train/click/loss"] for line in lines if "train/click/loss" in line]


@pytest.mark.slow
def test_a_compiled_model_has_the_same_curve_and_is_compiled_once(demo_arguments):
    _, expected, curve = trained(demo_arguments("model.deep.dropout=0", output="eager"))
    counters = torch._dynamo.utils.counters
    counters.clear()
    output, found, compiled_curve = trained(demo_arguments("model.deep.dropout=0", "loop.compile=kernels", output="compiled"))
    assert compiled_curve == pytest.approx(curve, abs=1e-6)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    outcome = json.loads((output / COMPILATION_FILE).read_text())
    assert (outcome["mode"], outcome["compiled"], outcome["reason"]) == ("kernels", True, "")
    assert min(outcome["seconds"], outcome["eager_ms"], outcome["compiled_ms"]) > 0
    assert counters["stats"]["unique_graphs"] == 1  # neither by the short last batch nor by anything else


def test_what_cannot_be_compiled_is_trained_to_the_same_bits(demo_arguments, caplog, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/no/such/compiler"))
    _, expected, curve = trained(demo_arguments("model.deep.normalization=batch", output="eager"))
    with torch._inductor.utils.fresh_cache():
        output, found, tried_curve = trained(demo_arguments("model.deep.normalization=batch", "loop.compile=kernels", output="tried"))
    outcome = json.loads((output / COMPILATION_FILE).read_text())
    assert not outcome["compiled"]
    assert outcome["compiled_ms"] is None
    assert "No working C++ compiler found" in outcome["reason"]
    assert f"compiling failed. {outcome['reason']}" in caplog.text
    assert tried_curve == curve
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_a_compiled_part_cannot_do_is_refused(demo_arguments):
    with pytest.raises(ConfigError, match=r"loop\.compile: expected none, because no module of the model has a method dense_part"):
        owner_of_dense_part(nn.Linear(2, 2))
    arguments = demo_arguments("loop.compile=cuda_graphs")
    with (
        Experiment(compose(arguments[0], arguments[1:])) as experiment,
        pytest.raises(ConfigError, match="expected none or kernels on a CPU"),
    ):
        _ = experiment.step
    arguments = demo_arguments("loop.compile=cuda_graphs", "loop.accumulate_batches=2", "objective.balance.kind=pcgrad")
    with pytest.raises(Problems, match=r"(?s)loop\.compile.*objective\.balance watches layers.*loop\.compile.*over those before"):
        compose(arguments[0], arguments[1:])


def test_the_dense_part_of_the_ranker_is_all_behind_the_embeddings(demo_arguments):
    arguments = demo_arguments("model.summaries={near: {features: [item_id, user_id]}}")
    with Experiment(compose(arguments[0], arguments[1:])) as experiment:
        model, batch = experiment.model.eval(), example_batch(experiment.schema, 3)
        assert torch.equal(model.dense_part(model.representation(batch)), model(batch))
