"""Experiment trackers of a fit, through the classes of Accelerate: TensorBoard, W&B, MLflow, or the user's own.

Rank 0 alone has trackers. One that cannot start is an error before the fit. One that fails later does not stop the fit:
what it refuses is kept, sent again after each evaluation and at the end, and by a resumed run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from bayes_lora.errors import BayesLoraError, ConfigError
from bayes_lora.recipes.config import RunConfig
from bayes_lora.utils.reading import read_json
from bayes_lora.utils.storage import write_json

__all__ = ["Trackers", "hyperparameters", "open_trackers"]

TRACKERS = "trackers.json"
"""In a run folder: what a resumed run continues each tracker with, and what was not sent."""
UNSENT = "unsent"
FINAL = "final"
"""Group of what a fit ends with."""
CURES = {
    "wandb": "Set WANDB_MODE=offline where there is no network, or leave it out.",
    "mlflow": "Check MLFLOW_TRACKING_URI, or leave it out.",
}

Entry = tuple[int, dict[str, float]]


@dataclass
class _Open:
    """A tracker that has started.

    Attributes:
        tracker: Accelerate's.
        facts: what continues it.
        logged: the last step of each name that an earlier process logged to the same run; it is not logged again.
        unsent: steps and their values that it has refused.
    """

    tracker: GeneralTracker
    facts: dict[str, Any]
    logged: dict[str, int] = field(default_factory=dict)
    unsent: list[Entry] = field(default_factory=list)

    def send(self, new: Sequence[Entry], *, retry: bool) -> None:
        """Send values, and with ``retry`` or if there are none before them also those that were refused before."""
        failed_before = bool(self.unsent)
        for step, values in new:
            values = {name: value for name, value in values.items() if step > self._logged(name)}
            self.unsent += [(step, values)] if values else []
        if failed_before and not retry:
            return
        try:
            while self.unsent:
                step, values = self.unsent[0]
                self._log(values, step)
                del self.unsent[0]
        except Exception as error:  # of a package, a server or a disk
            if not failed_before:
                warnings.warn(
                    f"tracker {self.tracker.name!r} failed at step {self.unsent[0][0]}: {_line(error)}. The fit goes "
                    "on; what is not sent is sent after a later evaluation or by --resume",
                    stacklevel=2,
                )

    def _logged(self, name: str) -> int:
        return self.logged.get(name, -1)

    def _log(self, values: dict[str, float], step: int) -> None:
        if self.tracker.name == "wandb" and all(name.startswith(f"{FINAL}/") for name in values):
            self.tracker.run.summary.update(values)  # W&B takes no second entry of the last step from another process
        else:
            self.tracker.log(values, step=step)


@dataclass
class Trackers:
    """The trackers of a fit.

    Attributes:
        opened: those that have started.
        run: the run folder, or None.
    """

    opened: list[_Open] = field(default_factory=list)
    run: Path | None = None

    def log(self, group: str, values: Mapping[str, float], step: int, *, retry: bool = False) -> None:
        """Log values of a step as ``group/name``; with ``retry``, first those that trackers have refused."""
        entry = step, {f"{group}/{name}": float(value) for name, value in values.items()}
        for one in self.opened:
            one.send([entry], retry=retry)

    def save(self) -> None:
        """Write what a resumed run continues with, at a checkpoint."""
        if self.run is not None and self.opened:
            write_json(self.run / TRACKERS, {one.tracker.name: one.facts | {UNSENT: one.unsent} for one in self.opened})

    def finish(self) -> None:
        """Send the rest, and end the trackers."""
        for one in self.opened:
            one.send([], retry=True)
            if one.unsent:
                where = "" if self.run is None else f"; they are in {self.run / TRACKERS}, and --resume sends them"
                warnings.warn(
                    f"tracker {one.tracker.name!r} did not get {len(one.unsent)} entries{where}", stacklevel=2
                )
            try:
                one.tracker.finish()
            except Exception as error:
                warnings.warn(f"tracker {one.tracker.name!r} did not end: {_line(error)}", stacklevel=2)
        self.save()


@contextmanager
def open_trackers(
    config: RunConfig, run: Path | None, first_step: int, own: Sequence[GeneralTracker] = ()
) -> Iterator[Trackers]:
    """Start the trackers of a run, or continue them, and finish them after the block.

    Args:
        config: settings of the run, which are logged as hyper-parameters of a new run of a tracker.
        run: the run folder. TensorBoard and W&B write their files there.
        first_step: the first step that is logged: what TensorBoard has from it on is hidden.
        own: the user's trackers.

    Raises:
        ConfigError: a tracker cannot start.
    """
    known = read_json(run / TRACKERS) if run is not None and (run / TRACKERS).exists() else {}
    known = {name: facts for name, facts in known.items() if isinstance(facts, dict)} if isinstance(known, dict) else {}
    trackers = Trackers(run=run)
    try:
        for name in dict.fromkeys(config.tracking.trackers):
            make = partial(_made, name, config, run, known.get(name), first_step)
            trackers.opened.append(_started(name, make, config, known.get(name)))
        for tracker in own:
            trackers.opened.append(_started(tracker.name, partial(_same, tracker), config, known.get(tracker.name)))
        trackers.save()
        yield trackers
    finally:
        trackers.finish()


def hyperparameters(config: RunConfig) -> dict[str, bool | int | float | str]:
    """Return the settings by dotted name. Values other than numbers and texts are in JSON, as trackers need it."""

    def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, Mapping) and value:
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value if isinstance(value, bool | int | float | str) else json.dumps(value)

    return dict(flat({name: value for name, value in config.to_dict().items() if name != "tracking"}))


def _made(
    name: str, config: RunConfig, run: Path | None, facts: Mapping[str, Any] | None, first_step: int
) -> GeneralTracker:
    """Return one of Accelerate's trackers, before it starts; ``facts`` are those of a run to continue."""
    settings = dict(config.tracking.init.get(name, {}))
    if name == "tensorboard":
        if run is None:
            raise ConfigError("tracking.trackers: 'tensorboard' writes into the run folder. Pass run, or leave it out.")
        return TensorBoardTracker("tensorboard", run, **({"purge_step": first_step} if facts else {}) | settings)
    if name == "wandb":
        place = {} if run is None else {"name": run.resolve().name, "dir": str(run)}
        return WandBTracker(config.tracking.project, **place | settings | (_continued(facts, "id", resume="allow")))
    place = {} if run is None else {"run_name": run.resolve().name}
    return MLflowTracker(config.tracking.project, **place | settings | _continued(facts, "run_id"))


def _continued(facts: Mapping[str, Any] | None, key: str, **more: Any) -> dict[str, Any]:
    return {key: facts[key], **more} if facts and isinstance(facts.get(key), str) else {}


def _same(tracker: GeneralTracker) -> GeneralTracker:
    return tracker


def _started(
    name: str, make: Callable[[], GeneralTracker], config: RunConfig, facts: Mapping[str, Any] | None
) -> _Open:
    """Start a tracker, and log the settings if its run is new."""
    try:
        tracker = make()
        if hasattr(tracker, "start"):  # before Accelerate 1.8 trackers started when they were made
            tracker.start()
        found = _Open(
            tracker, _facts(name, tracker), unsent=[(step, values) for step, values in (facts or {}).get(UNSENT, ())]
        )
        if facts is None:
            tracker.store_init_configuration(hyperparameters(config))
        else:
            found.logged = _last_steps(name, tracker)
    except BayesLoraError:
        raise
    except Exception as error:  # whatever a package raises when it has no network, key or permission
        cure = CURES.get(name, "Leave it out.")
        raise ConfigError(f"tracking.trackers: {name!r} cannot start: {_line(error)}. {cure}") from error
    return found


def _facts(name: str, tracker: Any) -> dict[str, Any]:
    if name == "wandb":
        return {"id": tracker.run.id}
    return {"run_id": tracker.active_run.info.run_id} if name == "mlflow" else {}


def _last_steps(name: str, tracker: Any) -> dict[str, int]:
    """Return the last step of each name in a run that is continued, where it would keep a second value of a step.

    W&B has one count of steps for all names, and leaves out by itself what is before it. TensorBoard hides what was
    logged from ``purge_step`` on.
    """
    if name != "mlflow":
        return {}
    from mlflow.tracking import MlflowClient

    run, client = tracker.active_run, MlflowClient()
    found = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {key: max(metric.step for metric in history) for key, history in found.items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
