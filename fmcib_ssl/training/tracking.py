"""Loggers that a run may be stopped and gone on with, without a gap and without a repeat.

`metrics.csv` is the record: it is cut back to the checkpoint that a run goes on from, and the others are brought into
line with it. No logger ever stops the training.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment, Logger  # type: ignore[attr-defined]
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from fmcib_ssl.io import HIDDEN, write_atomically
from fmcib_ssl.training.run_folder import RunFolderError

logger = logging.getLogger(__name__)

#: What W&B would send of itself, and is not to: command line, user, what the run prints, code, packages; the machine's
#: name is asked for by its server, which gets another.
_UNSAID: Mapping[str, Any] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "host": HIDDEN,
    "program": "train.py",
    "program_abspath": "",
    "program_relpath": "",
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}


@dataclass(frozen=True)
class Start:
    """What a logger has to know of the start of a run, the first one or a later one.

    Attributes:
        run_id: the same for all starts.
        step: optimizer steps that were done before.
        metrics: the run's `metrics.csv`.
        record: settings, versions, state of the code, checksum of the data: plain values.
    """

    run_id: str
    step: int
    metrics: Path
    record: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Resumable(Protocol):
    """A logger that wants to know what it goes on with, before it logs anything; called in the main process only."""

    def go_on(self, start: Start) -> None:
        """Forget what was logged from `start.step` on: it is going to be logged again."""
        ...


@runtime_checkable
class ShowsPictures(Protocol):
    """A logger with a page that pictures can be put on."""

    def show(self, name: str, picture: Path) -> None:
        """Put a picture on the page; one that is not there is left out."""
        ...


class MetricsFile(Logger):
    """One row a step in a CSV file, appended as they come.

    Args:
        path: of the file.

    Attributes:
        unwritten: rows that the disk did not take; they are tried again, and kept in checkpoints meanwhile.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self.unwritten: list[dict[str, Any]] = []
        self._columns: list[str] = []
        self._size = 0  # of what was written whole

    @property
    def name(self) -> str:
        """Part of the path that Lightning would make of it; not used."""
        return ""

    @property
    def version(self) -> str:
        """Part of the path that Lightning would make of it; not used."""
        return ""

    def go_on(self, start: Start) -> None:
        """Cut the rows from `start.step` on.

        Raises:
            RunFolderError: the file cannot be written.
        """
        columns, rows, num_damaged = _parsed(self.path)
        kept = [row for row in rows if int(row["step"]) < start.step]
        try:
            if num_damaged:
                aside = self.path.replace(self.path.with_name(f"{self.path.name}.unusable"))
                logger.warning("%s: %d damaged lines are left out; as it was: %s", self.path, num_damaged, aside)
            if kept:
                self._write_anew(kept, columns)
            else:
                self.path.unlink(missing_ok=True)
                self._columns, self._size = [], 0
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Take the rows that were not written when a checkpoint was, unless they were later."""
        written = {int(row["step"]) for row in read_metrics(self.path)[1]} if rows else set()
        self.unwritten = [row for row in rows if row["step"] not in written]

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """They are in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row."""
        self.unwritten.append({**metrics, "step": len(self.unwritten) if step is None else step})

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that are not in the file yet; a disk that is full is not fatal, they are tried again."""
        if not self.unwritten:
            return
        columns = sorted(set(self._columns).union(*self.unwritten))
        try:
            exists = self.path.exists()
            if exists and self._columns and self.path.stat().st_size > self._size:
                os.truncate(self.path, self._size)  # a part of these rows, from a try before
            if columns != self._columns or not exists:
                self._write_anew([*read_metrics(self.path)[1], *self.unwritten], columns)
            else:
                text = _csv_of(self.unwritten, columns).encode()
                with self.path.open("ab") as file:
                    file.write(text)
                self._size += len(text)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.path, error.strerror or error)
            return
        self.unwritten = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    def _write_anew(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        text = f"{_csv_of([dict(zip(columns, columns, strict=True))], columns)}{_csv_of(rows, columns)}".encode()
        write_atomically(self.path, text)
        self._columns, self._size = columns, len(text)


def _csv_of(rows: list[dict[str, Any]], columns: list[str]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue()


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows of a metrics file; what a killed process left unfinished at its end is left out."""
    return _parsed(path)[:2]


def _parsed(path: Path) -> tuple[list[str], list[dict[str, Any]], int]:
    """Columns, rows and the number of lines that are no rows."""
    if not path.is_file():
        return [], [], 0
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\0", "\ufffd")
    lines = text[: text.rfind("\n") + 1].splitlines()
    reader = csv.DictReader(lines, strict=False)
    columns = list(reader.fieldnames or [])
    rows = [row for row in reader if _is_row(row)] if columns.count("step") == 1 else []
    return columns if rows else [], rows, max(0, len(lines) - 1 - len(rows))


def _is_row(row: Mapping[str | None, Any]) -> bool:
    """Whether there is a number, or nothing, in every column and in no other."""
    try:
        [float(value) for value in row.values() if value != ""]
    except (TypeError, ValueError):  # TypeError: too many columns, or too few
        return False
    return re.fullmatch("[0-9]+", row["step"]) is not None


class TensorBoard(TensorBoardLogger):
    """Lightning's logger; of a run that was stopped, the events that are logged again replace those before.

    Args:
        save_dir: the run folder.
        name: of the folder in it.
        version: of the folder in that; empty for none.
    """

    def __init__(self, save_dir: Path | str, name: str = "tensorboard", version: str = "") -> None:
        super().__init__(save_dir, name=name, version=version)
        self._first_step = 0

    def go_on(self, start: Start) -> None:
        """Tell TensorBoard to leave out what earlier files have from this step on."""
        if start.step or any(Path(self.log_dir).glob("events.*")):
            self._kwargs["purge_step"] = start.step
        self._first_step = start.step

    @rank_zero_only
    def show(self, name: str, picture: Path) -> None:
        """Put a picture under the tab for images; one that cannot be written is left out."""
        if picture.is_file():
            try:
                with Image.open(picture) as image:
                    pixels = np.asarray(image.convert("RGB"))
                self.experiment.add_image(name, pixels, self._first_step, dataformats="HWC")
            except Exception as error:  # as of W&B: whatever goes wrong there, training is worth more
                logger.warning("TensorBoard does not show %s: %s", picture, error)


class WeightsAndBiases(WandbLogger):
    """Lightning's logger with one run id for all starts; it falls back to offline and never stops the training.

    The page is brought into line with `metrics.csv` at every start: what the server lacks is sent, and a step that it
    has is not sent twice. A run that is tracked offline is written anew and whole at every start, so only the newest
    of its folders has to be synchronised.

    Args:
        project: on the server.
        name: of the run on the page.
        save_dir: W&B makes its folder `wandb` below it.
        offline: nothing leaves the machine.
        entity: user or team; None is the default of the account.
        timeout_s: how long the server may take to answer at the start, and for what is left to send at the end.
    """

    def __init__(
        self,
        project: str,
        name: str,
        save_dir: str | Path,
        *,
        offline: bool = False,
        entity: str | None = None,
        timeout_s: float = 20.0,
    ) -> None:
        super().__init__(project=project, name=name, save_dir=save_dir, offline=offline, entity=entity)
        self._timeout_s = timeout_s
        self._start: Start | None = None
        self._lost = False  # tracking has failed and was given up

    def go_on(self, start: Start) -> None:
        """Take the run's id."""
        self._start = start
        self._wandb_init["id"] = self._id = start.run_id

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run, begun when it is first asked for."""
        if self._experiment is None and not self._lost:
            try:
                self._experiment = self._begin()
            except Exception as error:
                self._give_up(error)
        return DummyExperiment() if self._lost else self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log under the run's own step, so that the server can tell what it has already."""
        run = self.experiment
        if not self._lost:
            try:
                if step is None or step >= run.starting_step:  # what it has is the same
                    run.log({**metrics, "trainer/global_step": step}, step=step)
            except Exception as error:  # whatever goes wrong there, training is worth more
                self._give_up(error)

    @rank_zero_only
    def show(self, name: str, picture: Path) -> None:
        """Put a picture on the page."""
        import wandb  # noqa: PLC0415  (takes a second, and most runs do without)

        run = self.experiment
        if not self._lost and picture.is_file():
            try:
                run.summary[name] = wandb.Image(str(picture))
            except Exception as error:
                self._give_up(error)

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """Send what is left, for as long as it may take, and close the run; the next start opens it again."""
        if self._experiment is None or self._lost:
            return
        folder, offline = self._experiment.settings.sync_dir, self._experiment.settings._offline
        try:
            self._experiment.finish(exit_code=exit_code)
        except TimeoutError:
            logger.warning(
                "Weights & Biases did not take everything within %g s; the next start of this run sends what is "
                "missing, and so does: wandb sync %s", self._timeout_s, folder,
            )  # fmt: skip
        except Exception as error:
            self._give_up(error)
        if offline:
            logger.info("tracked offline; to upload it: wandb sync %s", folder)

    def _begin(self) -> Any:
        import wandb  # noqa: PLC0415

        mode: Any = "offline" if self._offline else os.environ.get("WANDB_MODE", "online")
        limits: dict[str, Any] = {
            "init_timeout": self._timeout_s,
            "login_timeout": self._timeout_s,
            "finish_timeout": self._timeout_s,
            "finish_timeout_raises": True,
        }
        known = {name: value for name, value in {**limits, **_UNSAID}.items() if hasattr(wandb.Settings(), name)}
        arguments = {key: value for key, value in self._wandb_init.items() if value is not None}
        run: Any = None
        if mode == "online":
            try:
                run = wandb.init(**arguments, mode="online", settings=wandb.Settings(**known))
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                logger.warning(
                    "Weights & Biases cannot be reached (%s): tracking offline. `wandb login` helps if you are not "
                    "logged in; `wandb sync` uploads the run later", reason,
                )  # fmt: skip
                mode = "offline"
                wandb.teardown()  # else the id counts as taken
        if run is None:
            run = wandb.init(**arguments, mode=mode, settings=wandb.Settings(**known))
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        if self._start is not None:
            run.config.update(dict(self._start.record), allow_val_change=True)
            self._catch_up(run, self._start)
        return run

    def _catch_up(self, run: Any, start: Start) -> None:
        """Send the rows of `metrics.csv` that the page lacks: all of them, if this part of the run is offline."""
        for row in read_metrics(start.metrics)[1]:
            step = int(row.pop("step"))
            if run.starting_step <= step < start.step:
                numbers = {key: float(value) for key, value in row.items() if value not in ("", None)}
                run.log({**numbers, "trainer/global_step": step}, step=step)

    def _give_up(self, error: Exception) -> None:
        self._lost = True
        logger.warning(
            "Weights & Biases stopped working (%s: %s); training goes on, metrics.csv has everything, and the next "
            "start sends it", type(error).__name__, error,
        )  # fmt: skip
