"""trackers.py: what a tracker was told is read back with its own reader; none stops a run."""

import sys

import pytest
from run_records import evaluation, summary_of, train_record

from mlx_tuner.show import trackers
from mlx_tuner.show.trackers import Trackers
from mlx_tuner.system import install

RECORDS = [train_record(10, 1.25), evaluation(10, 0.75), train_record(20, 1.0)]


def told(name, run, records=RECORDS, status="finished", *, run_id="one", rate=0.1) -> list[str]:
    """Notes of a run that reports to a tracker."""
    run.mkdir(exist_ok=True)
    notes: list[str] = []
    config = {"train.learning_rate": rate, "model.path": "x"}
    reports = Trackers([name], run, run_id, config, notes.append)
    for record in records:
        reports.record(record)
    reports.end(summary_of(records, status=status))
    return notes


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert told("tensorboard", tmp_path / "run") == []
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()

    def values(name):
        tensors = events.Tensors(name)
        return [(t.step, t.tensor_proto.float_val[0]) for t in tensors]

    assert values("loss") == [(10, 1.25), (20, 1.0)]
    assert values("val_loss") == [(10, 0.75)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_a_resumed_run_as_one_and_its_replacement_as_another(tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    assert told("mlflow", run, RECORDS[:2], status="stopped") == []
    assert told("mlflow", run, RECORDS[2:]) == []
    assert told("mlflow", run, RECORDS[:1], status="stopped", run_id="two", rate=0.2) == []
    client = tracking.MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.get_experiment_by_name("mlx-tune").experiment_id
    first, second = client.search_runs([experiment], order_by=["attributes.start_time"])

    def losses(found):
        history = client.get_metric_history(found.info.run_id, "loss")
        return [(metric.step, metric.value) for metric in history]

    assert losses(first) == [(10, 1.25), (20, 1.0)]
    assert first.data.params == {"train.learning_rate": "0.1", "model.path": "x"}
    assert (first.info.status, first.info.run_name) == ("FINISHED", "run")
    assert losses(second) == [(10, 1.25)]
    assert second.data.params == {"train.learning_rate": "0.2", "model.path": "x"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_its_files_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert told("wandb", tmp_path / "run") == []
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert kept.name == "run-one.wandb"
    content = kept.read_bytes()
    assert b"val_loss" in content
    assert b"0.75" in content


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trackio_has_a_resumed_run_as_one_and_its_replacement_as_another(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    run = tmp_path / "run"
    assert told("trackio", run, RECORDS[:2], status="stopped") == []
    assert told("trackio", run, RECORDS[2:]) == []
    assert told("trackio", run, RECORDS[:1], run_id="two") == []
    storage = trackio.sqlite_storage.SQLiteStorage

    def losses(name):
        logs = storage.get_logs("mlx-tune", name)
        return [(log["step"], log["loss"]) for log in logs if "loss" in log]

    assert {name: losses(name) for name in storage.get_runs("mlx-tune")} == {
        "run-one": [(10, 1.25), (20, 1.0)],
        "run-two": [(10, 1.25)],
    }


class Broken:
    """A tracker that begins to fail."""

    calls = 0

    def __init__(self, run, run_id, config):
        pass

    def log(self, values, step):
        Broken.calls += 1
        raise ConnectionError("no route to\nthe server")

    def end(self, summary, finished):
        raise AssertionError("was left out")


def test_a_tracker_that_fails_is_left_out_once_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.KINDS, "wandb", Broken)
    assert told("wandb", tmp_path / "run") == ["wandb is left out: no route to"]
    assert Broken.calls == 1


@pytest.mark.parametrize("name", list(trackers.KINDS))
def test_one_that_is_not_installed_is_named_with_what_installs_it(name, tmp_path, monkeypatch):
    for module in ("tensorboard.summary", "mlflow.tracking", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    (note,) = told(name, tmp_path / "run")
    assert note == f"{name} is left out: not installed; {install.extra(name)}"
