"""The declaration of a pipeline: what is refused, with the place and the fix."""

from __future__ import annotations

import pytest
import yaml

from mlenv.ci.pipeline import Pipeline, Stage, read_pipeline
from mlenv.errors import ConfigError, Problems

GOOD = {"steps": ["make test"]}


def test_a_declaration_is_read_beside_other_sections(tmp_path):
    file = tmp_path / "mlenv.yaml"
    file.write_text(
        """
images: {train-cpu: {}}
pipeline:
  name: ranker
  stages:
    test: {steps: [make test]}
    promote: {steps: [mlenv promote ranker], when: [main], needs: [test], may_be_held: true}
"""
    )
    pipeline = read_pipeline(file)
    assert isinstance(pipeline, Pipeline)
    assert list(pipeline.stages) == ["test", "promote"]
    assert [pipeline.stages[name].machine for name in pipeline.stages] == ["", ""]
    assert [Stage(steps=("x",), docker=True).machine, Stage(steps=("x",), docker=True, gpu=True).machine] == ["docker", "gpu"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipeline: [", "expected YAML"),
        ("images: {}", "pipeline: expected a section with name and stages. Received: None"),
        ("- a", "pipeline: expected a section with name and stages"),
    ],
)
def test_a_file_without_a_declaration_is_refused(text, message, tmp_path):
    (tmp_path / "mlenv.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"mlenv\.yaml") as caught:
        read_pipeline(tmp_path / "mlenv.yaml")
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match=r"expected a readable YAML file.*Fix: run in the folder of a repo"):
        read_pipeline(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({}, "stages: expected at least one"),
        ({"test": {"steps": []}}, "stages.test.steps: expected at least one line"),
        ({"test": {"steps": [" "]}}, "stages.test.steps: expected one line for sh in each"),
        ({"test": {"steps": ["a\nb"]}}, "stages.test.steps: expected one line for sh in each. Received: 'a\\nb'"),
        ({"test": GOOD | {"when": []}}, "stages.test.when: expected some of change, main, nightly"),
        ({"test": GOOD | {"when": ["nightli"]}}, "Received: 'nightli'. Fix: did you mean 'nightly'"),
        ({"test": GOOD | {"secrets": ["token"]}}, "stages.test.secrets: expected names of environment variables, in capitals"),
        ({"test": GOOD | {"timeout_minutes": 0}}, "stages.test.timeout_minutes: expected a number >= 1"),
        ({"test": {"steps": ["a", "b"], "may_be_held": True}}, "stages.test.steps: expected one step in a stage that may be held"),
        ({"Test it": GOOD}, "stages.Test it: expected small letters"),
        ({"image": GOOD}, "stages.image: expected small letters, digits and dashes, and none of cache"),
        ({"push": GOOD | {"needs": ["test"]}, "test": GOOD}, "stages.push.needs: expected a stage that is written before it"),
        ({"test": GOOD, "push": GOOD | {"needs": ["tst"]}}, "Received: 'tst'. Fix: did you mean 'test'"),
        (
            {"test": GOOD | {"when": ["change"]}, "push": GOOD | {"needs": ["test"], "when": ["main"]}},
            "stages.push.needs: expected a stage that runs on main too. Received: 'test'. Fix: add main to stages.test.when",
        ),
        ({"hold": GOOD | {"may_be_held": True}, "push": GOOD | {"needs": ["hold"]}}, "expected a stage that a gate does not hold"),
        ({"test": GOOD | {"gpus": 1}}, "stages.test.gpus: expected a key of Stage. Received: 1. Fix: did you mean 'gpu'"),
    ],
)
def test_what_no_provider_could_run_is_refused(stages, message, tmp_path):
    (tmp_path / "mlenv.yaml").write_text(yaml.safe_dump({"pipeline": {"name": "ranker", "stages": stages}}, sort_keys=False))
    with pytest.raises(Problems, match=r"mlenv\.yaml") as caught:
        read_pipeline(tmp_path / "mlenv.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("nightly", "every night"), ("nightly", "0 3 * *"), ("python", "3"), ("main", "a'b")])
def test_a_value_of_the_wrong_form_is_refused(key, value):
    with pytest.raises(Problems, match=f"{key}: expected"):
        Pipeline(name="ranker", stages={"test": Stage(steps=("make test",))}, **{key: value})
