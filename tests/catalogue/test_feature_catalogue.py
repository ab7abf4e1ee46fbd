"""The catalogue of features, read from a real MLflow store that real trainings wrote."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlenv.catalogue.feature_catalogue import Catalogue, CatalogueReader
from mlenv.catalogue.feature_record import FEATURES_FILE, FeatureRecord
from mlenv.cli import main
from mlenv.composition import compose, to_yaml
from mlenv.training import train

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow")

ROOT = Path(__file__).parents[2]
SMALL = ["data.batch_size=128", "data.test=null", "loop.max_steps=2", "embeddings.engine=torch", "tracking.experiment=ads"]


@pytest.fixture(scope="module")
def store(ads: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two trainings, the first registered as champion; an older run without the record; a run of something else."""
    folder = tmp_path_factory.mktemp("store of a test")
    uri = f"sqlite:///{folder}/runs.db"
    tracked = [*SMALL, f"tracking.uri={uri}", f"data.path={ads}"]
    for name, settings in (
        ("first", ["data.train.end=2026-01-02"]),
        (
            "second",
            [
                "data.train.end=2026-01-03",
                "schema.features.price.owner=pricing",
                "schema.features.price.log1p=false",
                "schema.tables.advertiser_id.embedding_dim=8",
            ],
        ),
    ):
        config = compose(ROOT / "examples/demo/ranker.yaml", [*tracked, *settings, f"name={name}", f"output={folder / name}"])
        train(config)
        assert FeatureRecord.from_json((folder / name / FEATURES_FILE).read_text()).features.keys() == config.schema.features.keys()
    client = MlflowClient(uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("ads")
    assert experiment is not None
    (folder / "config.yaml").write_text(to_yaml(config))
    older = client.create_run(experiment.experiment_id, run_name="older", start_time=1_000).info.run_id
    client.log_artifact(older, str(folder / "config.yaml"))
    client.set_terminated(older)
    client.create_run(client.create_experiment("elsewhere"), run_name="other")
    first = next(run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == "first")
    client.create_registered_model("ranker")
    for _ in range(2):
        client.create_model_version("ranker", f"{first.info.artifact_uri}/model", run_id=first.info.run_id)
    client.set_registered_model_alias("ranker", "champion", "2")
    return uri


@pytest.fixture(scope="module")
def catalogue(store: str) -> Catalogue:
    return CatalogueReader(store).read()


def test_features_runs_versions_and_days_are_found(catalogue: Catalogue, ads: Path) -> None:
    assert [run.name for run in catalogue.runs] == ["second", "first", "older"]
    assert catalogue.num_others == 1
    assert len(catalogue.features) == 16
    price = catalogue.feature("price")
    assert (price.definition.entity, price.definition.owner, price.kind, price.storage, price.table) == (
        "item",
        "pricing",
        "numeric",
        "",
        "",
    )
    assert price.data_sets == [str(ads)]
    assert [(day, entry.rows, run.name) for day, (entry, run) in price.days.items()] == [
        (f"2026-01-0{number}", 2000, "second") for number in (1, 2, 3)
    ]
    assert price.newest is not None
    assert price.newest[0] == "2026-01-03"
    first = catalogue.runs[1]
    assert sorted((one.name, one.version, one.aliases) for one in price.versions) == [("ranker", "1", ()), ("ranker", "2", ("champion",))]
    assert {one.run_id for one in price.versions} == {first.run_id}
    history = catalogue.feature("history")
    assert (history.kind, history.storage, history.table) == ("sequence", "int64, string", "history_action, item")


def test_definitions_that_differ_are_named_with_their_runs(catalogue: Catalogue) -> None:
    lines = [re.sub(r" \(\w{8}\)", "", line) for line in catalogue.feature("price").differences]
    # The older run was written with the second one's config.
    assert lines == ["owner: 'pricing' in second, older; '' in first", "log1p: False in second, older; True in first"]
    (line,) = catalogue.feature("advertiser_id").differences
    assert re.fullmatch(r"tables.advertiser_id.embedding_dim: 8 in second \(\w{8}\), older \(\w{8}\); 16 in first \(\w{8}\)", line)
    assert catalogue.feature("history").differences == []


def test_the_list_is_narrowed(catalogue: Catalogue) -> None:
    assert [one.name for one in catalogue.matching(owner="pricing")] == ["price"]
    assert {one.definition.entity for one in catalogue.matching(entity="user")} == {"user"}
    assert [one.name for one in catalogue.matching(text="WEIGHT")] == ["topic_weights"]


def test_the_commands_print_it(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["features", "list", "--uri", store, "--experiment", "ads", "--match", "price"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^price +item +pricing +numeric +- +9\d\.\d\d% .* 1 +3 +2$", printed, re.MULTILINE)
    assert f"1 of 16 features, 3 runs of {store}" in printed
    assert main(["features", "show", "price", "--uri", store]) == 0
    assert "owner: 'pricing' in second" in capsys.readouterr().out
    assert main(["features", "usage", "price", "--uri", store]) == 0
    assert re.search(r"ranker version 2 \(@champion\), made from run first", capsys.readouterr().out)
    assert main(["features", "alerts", "--uri", store]) == 0
    assert "0 failures, 0 warnings among 16 features" in capsys.readouterr().out
    assert main(["features", "usage", "prise", "--uri", store]) == 2
    assert "did you mean 'price'" in capsys.readouterr().err
    assert main(["features", "list", "--uri", store, "--experiment", "adds"]) == 2
    assert "did you mean 'ads'" in capsys.readouterr().err


def test_data_measured_now_raise_an_alert(store: str, demo_arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    config, *settings = demo_arguments('data.transforms=[{kind: derive, column: price, sql: "NULLIF(price, price)"}]')
    command = ["features", "alerts", "--uri", store, "--config", config, *settings]
    assert main(command) == 3
    assert re.search(r"^FAIL .* price .*2026-01-03, data\.test of demo-ranker .* 0\.00%$", capsys.readouterr().out, re.MULTILINE)


def test_a_store_that_is_not_there_is_named_and_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path}/none.db"
    assert main(["features", "list", "--uri", uri]) == 2
    assert f"{uri}: expected a database of tracked runs" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
    assert main(["features", "list", "--uri", "http://me:secret@127.0.0.1:9"]) == 2
    printed = capsys.readouterr().err
    assert "MLflow at http://127.0.0.1:9: " in printed
    assert "secret" not in printed
    assert main(["features", "alerts", "--uri", uri, "--dry-run"]) == 0
    assert "would read the runs of" in capsys.readouterr().out


def test_what_another_version_or_a_hand_wrote_is_passed_over(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = MlflowClient(store)
    run_id = client.create_run(client.create_experiment("by hand"), run_name="odd").info.run_id
    (tmp_path / "config.yaml").write_text("name: [of, [a, cat")
    client.log_artifact(run_id, str(tmp_path / "config.yaml"))
    assert CatalogueReader(store, "by hand").read().features == {}
    assert f"Run odd ({run_id}) is passed over" in caplog.text


def test_a_record_that_arrives_after_the_end_of_its_run_is_seen(store: str, tmp_path: Path) -> None:
    client = MlflowClient(store)
    run_id = client.create_run(client.create_experiment("late"), run_name="late").info.run_id
    for name in ("config.yaml", FEATURES_FILE):
        shutil.copy(Path(store.removeprefix("sqlite:///")).parent / "second" / name, tmp_path)
    client.log_artifact(run_id, str(tmp_path / "config.yaml"))
    client.set_terminated(run_id)
    reader = CatalogueReader(store, "late")
    assert reader.read().feature("price").days == {}
    client.log_artifact(run_id, str(tmp_path / FEATURES_FILE))
    assert len(reader.read().feature("price").days) == 3
    assert reader.read().runs[0] is reader.read().runs[0]  # and read no more
