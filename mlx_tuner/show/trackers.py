"""Trackers that a recipe names: a run's numbers, also where its user looks at those of other runs.

Each is an extra of its own and works without a network. One that fails is left out from then on,
with a note; it never stops a run, whose own files always have everything.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_tuner.errors import first_line
from mlx_tuner.runs.metrics import FINISHED, STOPPED_EARLY, Record, Summary
from mlx_tuner.runs.place import TENSORBOARD
from mlx_tuner.system import install

PROJECT = "mlx-tune"
_SHOWN = (
    *("loss", "grad_norm", "learning_rate", "samples_per_second", "tokens_per_second"),
    *("memory_gb", "peak_memory_gb", "epoch", "val_loss"),
)


class Tracker(Protocol):
    """What is asked of one."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name."""

    def end(self, summary: Mapping[str, Any], finished: bool) -> None:
        """Called once, when this process ends."""


class TensorBoard:
    """Event files in the run's directory, for `tensorboard --logdir adapters`."""

    def __init__(self, run: Path, run_id: str, config: Mapping[str, Any]) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(run / TENSORBOARD))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step=step)
        self._writer.flush()

    def end(self, summary: Mapping[str, Any], finished: bool) -> None:
        self._writer.close()


class MLflow:
    """The server of MLFLOW_TRACKING_URI, else a database in the run's directory."""

    def __init__(self, run: Path, run_id: str, config: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.resolve()}/mlflow.db"
        self._client = MlflowClient(uri)
        known = self._client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known else self._client.create_experiment(PROJECT)
        tags = {"run": str(run.resolve()), "run_id": run_id}
        same = f"tags.run_id = '{run_id}'"
        if found := self._client.search_runs([experiment], same, max_results=1):
            self._run = found[0].info.run_id  # of a process that this one resumes
            return
        self._run = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        for name, value in config.items():
            self._client.log_param(self._run, name, value)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, int(1000 * time.time()), step)

    def end(self, summary: Mapping[str, Any], finished: bool) -> None:
        if finished:
            self._client.set_terminated(self._run)


class WandB:
    """Weights & Biases: online where there is a key, else files in the run's directory."""

    def __init__(self, run: Path, run_id: str, config: Mapping[str, Any]) -> None:
        import wandb

        offline = "offline" if wandb.api.api_key is None else "online"
        mode: Any = os.environ.get("WANDB_MODE", offline)
        self._run = wandb.init(
            project=PROJECT,
            name=run.name,
            id=run_id,
            resume="allow",
            dir=str(run),
            config=dict(config),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def end(self, summary: Mapping[str, Any], finished: bool) -> None:
        self._run.summary.update({k: v for k, v in summary.items() if isinstance(v, (int, float))})
        self._run.finish()


class Trackio:
    """Trackio's own database on this machine, for `trackio show`."""

    def __init__(self, run: Path, run_id: str, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(
            project=PROJECT,
            name=f"{run.name}-{run_id[:6]}",
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def end(self, summary: Mapping[str, Any], finished: bool) -> None:
        self._trackio.finish()


KINDS: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


class Trackers:
    """All that a run reports to.

    Args:
        names: of `KINDS`.
        run: its directory.
        run_id: what a run that goes on has kept, and one that replaces another has not.
        config: the recipe's keys, such as "train.epochs", and their values.
        note: tells the user of one that is left out.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: Path,
        run_id: str,
        config: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        self._note = note
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            made = self._try(name, lambda name=name: KINDS[name](run, run_id, config))  # type: ignore[misc]
            if made is not None:
                self._trackers[name] = made

    def record(self, record: Record) -> None:
        """A log line or an evaluation."""
        values = record.to_json()
        shown = {n: values[n] for n in _SHOWN if values.get(n) is not None}
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.log(shown, record.step))  # type: ignore[misc]

    def end(self, summary: Summary) -> None:
        """This process has no more to tell."""
        finished = summary.status in (FINISHED, STOPPED_EARLY)
        values = summary.to_json()
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.end(values, finished))  # type: ignore[misc]

    def _try(self, name: str, what: Callable[[], Any]) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of their own libraries
                return what()
        except ModuleNotFoundError:
            self._leave_out(name, f"not installed; {install.extra(name)}")
        except (Exception, SystemExit) as error:  # another's code, and it must not stop a run
            self._leave_out(name, first_line(error))
        return None

    def _leave_out(self, name: str, why: str) -> None:
        self._trackers.pop(name, None)
        self._note(f"{name} is left out: {why}")
