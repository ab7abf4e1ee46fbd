"""A few steps of a training are profiled, and the page says what limits them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mlenv import Experiment, compose, fit
from mlenv.errors import ConfigError
from mlenv.loops.step_profile import Operator, StepProfile
from mlenv.pages.profile_page import limit_of, render_profile, shares_of

PRODUCT = Operator("aten::mm", calls=30, host_seconds=0.6, device_seconds=0.0)
PROFILE = StepProfile("cpu", num_steps=10, seconds=1.0, waiting_seconds=0.1, communication_seconds=0.05, operators=(PRODUCT,))
ON_GPU = replace(PROFILE, device="cuda:0", operators=(replace(PRODUCT, device_seconds=0.9),))


def test_shares_by_hand():
    expected = {"waiting for data": 0.1, "operators": 0.6, "communication": 0.05, "Python and all else": 0.25}
    assert shares_of(PROFILE) == pytest.approx(expected)
    on_gpu = {"waiting for data": 0.1, "kernels on the GPU": 0.9, "communication on the GPU": 0.05, "operators on the host": 0.6}
    assert shares_of(ON_GPU) == pytest.approx(on_gpu)


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (PROFILE, "The step computes 60%"),
        (replace(PROFILE, waiting_seconds=0.35), "waits for data 35%"),
        (replace(PROFILE, communication_seconds=0.4), "send and receive 40%"),
        (replace(PROFILE, operators=(replace(PRODUCT, host_seconds=0.2),)), "between operators take 65%"),
        (ON_GPU, "The step computes 90%"),
        (replace(ON_GPU, operators=(replace(PRODUCT, device_seconds=0.5),)), "The GPU computes only 50%"),
    ],
)
def test_the_page_says_what_limits_the_step(profile, said):
    assert said in limit_of(profile)
    page = render_profile(profile, "a <test>")
    assert said in page
    assert "a &lt;test&gt;" in page
    assert "aten::mm" in page
    assert '<td class="figure ">3.0</td>' in page  # calls a step
    assert ("GPU, ms a step" in page) is profile.device.startswith("cuda")


def test_a_training_writes_a_trace_and_a_page_and_trains_as_ever(demo_arguments, tmp_path):
    steps = {}
    for output, settings in (("plain", []), ("profiled", ["loop.profile_steps=3"])):
        arguments = demo_arguments(*settings, "loop.max_steps=14", output=output)
        config = compose(arguments[0], arguments[1:])
        with Experiment(config) as experiment:
            fit(experiment.step, experiment.source("train"), experiment.run, config.loop)
            steps[output] = [parameter.detach().clone() for parameter in experiment.model.parameters()]
    assert all(bool((one == other).all()) for one, other in zip(*steps.values(), strict=True))
    folder = tmp_path / "profiled" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["profile.html", "trace.json"]
    names = [event.get("name") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]]
    assert names.count("Optimizer.step#RowWiseAdagrad.step") == 3
    assert "the mean of 3 steps" in (folder / "profile.html").read_text()
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_training_too_short_to_be_profiled_is_refused(demo_arguments):
    arguments = demo_arguments("loop.profile_steps=3", "loop.max_steps=12")
    with (
        Experiment(compose(arguments[0], arguments[1:])) as experiment,
        pytest.raises(ConfigError, match=r"loop\.profile_steps: expected at most 2,"),
    ):
        _ = experiment.step
