"""Loggers of a run that may be stopped and resumed, without a gap and without a repeat.

`metrics.csv` is the record: it is cut back to the checkpoint that a run resumes from, and the others are brought into
line with it. No logger ever stops the training.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers.logger import Logger
from PIL import Image

from fmcib_ssl.io import HIDDEN, write_atomically
from fmcib_ssl.training.run_folder import RunFolder, RunFolderError, flat_settings

logger = logging.getLogger(__name__)

#: What W&B would send of itself, and is not to: command line, user, what the run prints, code, packages; the machine's
#: name is asked for by its server, which gets another.
_WANDB_HIDES: Mapping[str, Any] = {
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


class RunLogger(Logger):
    """A logger that is told where a run begins or resumes before it logs anything, and may have a page for pictures.

    The main process alone has loggers.
    """

    @property
    def name(self) -> str:
        """Part of the path that Lightning would make of it; not used."""
        return ""

    @property
    def version(self) -> str:
        """Part of the path that Lightning would make of it; not used."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """They are in `config.yaml`."""

    def resume_from(self, folder: RunFolder, step: int, record: Mapping[str, Any]) -> None:
        """Begin, or forget what was logged from a step on: it is going to be logged again.

        Args:
            folder: of the run, whose id is the same for all starts.
            step: optimizer steps that were done before.
            record: settings, versions, state of the code, checksum of the data: plain values.
        """

    def show(self, name: str, picture: Path) -> None:
        """Put a picture on the page."""

    def finish(self, exit_code: int = 0) -> None:
        """The run has ended."""


class MetricsFile(RunLogger):
    """One row a step in a CSV file, appended as they come.

    Args:
        path: of the file.

    Attributes:
        unwritten: rows that the disk did not take; they are tried again, and no checkpoint is taken meanwhile.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self.unwritten: list[dict[str, Any]] = []
        self._columns: list[str] = []
        self._size = 0  # of what was written whole

    def resume_from(self, folder: RunFolder, step: int, record: Mapping[str, Any]) -> None:
        """Cut the rows from a step on.

        Raises:
            RunFolderError: the file cannot be written.
        """
        earlier = [row for row in read_metrics(self.path) if int(row["step"]) < step]
        try:
            if earlier:
                self._write_anew(earlier)
            else:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row."""
        self.unwritten.append({**metrics, "step": len(self.unwritten) if step is None else step})

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
                self._write_anew([*read_metrics(self.path), *self.unwritten])
            else:
                text = _csv_of(self.unwritten, columns)
                with self.path.open("ab") as file:
                    file.write(text)
                self._size += len(text)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.path, error.strerror or error)
            return
        self.unwritten = []

    def _write_anew(self, rows: list[dict[str, Any]]) -> None:
        columns = sorted(set().union(*rows))
        text = _csv_of([dict(zip(columns, columns, strict=True)), *rows], columns)
        write_atomically(self.path, text)
        self._columns, self._size = columns, len(text)


def _csv_of(rows: list[dict[str, Any]], columns: list[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue().encode()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, as text, without what a killed process left unfinished at its end.

    Damaged lines are left out too, which the log says.
    """
    if not path.is_file():
        return []
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\0", "\ufffd")
    lines = text[: text.rfind("\n") + 1].splitlines()
    reader = csv.DictReader(lines)
    rows = [row for row in reader if _is_row(row)] if list(reader.fieldnames or []).count("step") == 1 else []
    if (num_damaged := len(lines) - 1 - len(rows)) > 0:
        logger.warning("%s: %d damaged lines are left out", path, num_damaged)
    return rows


def last_value(rows: Iterable[Mapping[str, Any]], column: str) -> float | None:
    """The newest value in a column of a metrics file's rows; None: it has none."""
    values = [row[column] for row in rows if row.get(column)]
    return float(values[-1]) if values else None


def _is_row(row: Mapping[str | None, Any]) -> bool:
    """Whether there is a number, or nothing, in every column and in no other."""
    try:
        [float(value) for value in row.values() if value != ""]
    except (TypeError, ValueError):  # TypeError: too many columns, or too few
        return False
    return re.fullmatch("[0-9]+", row["step"]) is not None


class TensorBoard(RunLogger):
    """Events for TensorBoard; of a run that was stopped, the events that are logged again replace those before.

    Args:
        save_dir: the run folder.
        name: of the folder in it.
        version: of the folder in that; empty for none.
    """

    def __init__(self, save_dir: Path | str, name: str = "tensorboard", version: str = "") -> None:
        super().__init__()
        self._folder = Path(save_dir, name, version)
        self._first_step = 0
        self._writer: Any = None

    def resume_from(self, folder: RunFolder, step: int, record: Mapping[str, Any]) -> None:
        """Tell TensorBoard to leave out what earlier files have from this step on."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (slow, and most runs do without)

        self._first_step = step
        purge = step if step or any(self._folder.glob("events.*")) else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a point to each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def save(self) -> None:
        """Write what waits in memory."""
        self._writer.flush()

    def show(self, name: str, picture: Path) -> None:
        """Put a picture under the tab for images."""
        with Image.open(picture) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), self._first_step, dataformats="HWC")

    def finish(self, exit_code: int = 0) -> None:
        """Close the file."""
        self._writer.close()


class _Server(RunLogger):
    """What sends to a service; whatever goes wrong there, training is worth more."""

    service: str
    _run: Any = None  # none before the start, and when tracking has failed and was given up

    @contextmanager
    def _never_fatal(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._run = None
            logger.warning(
                "%s stopped working (%s: %s); training goes on, metrics.csv has everything, and the next start "
                "sends it", self.service, type(error).__name__, error,
            )  # fmt: skip

    def _send_again(self, folder: RunFolder, first: int, step: int) -> None:
        """The rows of `metrics.csv` before a step, from the first that the service lacks."""
        for row in read_metrics(folder.path / "metrics.csv"):
            if first <= (earlier := int(row.pop("step"))) < step:
                self.log_metrics({key: float(value) for key, value in row.items() if value}, earlier)


class MLflow(_Server):
    """A run on an MLflow server, or in a folder or database of its own, with one run for all starts.

    Args:
        tracking_uri: of the server, such as `http://host:5000`, or `sqlite:///FILE.db`; pictures go to `FILE` then.
        experiment: that the run belongs to; made if there is none.
        name: of the run.
    """

    service = "MLflow"

    def __init__(self, tracking_uri: str, experiment: str, name: str) -> None:
        super().__init__()
        self._uri, self._experiment, self._run_name = tracking_uri, experiment, name
        self._client: Any = None
        self._rows: list[Any] = []
        self._first_step = 0  # that the server lacks

    def resume_from(self, folder: RunFolder, step: int, record: Mapping[str, Any]) -> None:
        """Find the run of this id or create it, and send the rows of `metrics.csv` that it lacks."""
        with self._never_fatal():
            from mlflow import MlflowClient  # noqa: PLC0415  (an extra)
            from mlflow.entities import Param  # noqa: PLC0415

            self._client = MlflowClient(self._uri)
            known = self._client.get_experiment_by_name(self._experiment)
            # A server has a place for pictures; of a database they are beside it, not in the working directory.
            database = self._uri.removeprefix("sqlite:///")
            beside = None if database == self._uri else Path(database).resolve().with_suffix("").as_uri()
            experiment = known.experiment_id if known else self._client.create_experiment(self._experiment, beside)
            runs = self._client.search_runs([experiment], f"tags.run_id = '{folder.run_id}'")
            tags = {"run_id": folder.run_id}
            run = runs[0] if runs else self._client.create_run(experiment, tags=tags, run_name=self._run_name)
            self._run = run.info.run_id
            if not runs:
                values = [Param(name, str(value)) for name, value in flat_settings(record).items()]
                for begin in range(0, len(values), 100):  # as many as a request may hold
                    self._client.log_batch(self._run, params=values[begin : begin + 100])
            self._client.set_terminated(self._run, "RUNNING")
            self._first_step = int(run.data.tags.get("last_step", -1)) + 1
            self._send_again(folder, self._first_step, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep a row until it is sent; a step that the server has is not sent twice."""
        if self._run is not None and (step is None or step >= self._first_step):
            from mlflow.entities import Metric  # noqa: PLC0415

            now = round(1000 * time.time())
            self._rows += [Metric(name, float(value), now, step or 0) for name, value in metrics.items()]

    def save(self) -> None:
        """Send the rows that were kept."""
        with self._never_fatal():
            from mlflow.entities import RunTag  # noqa: PLC0415  (an extra)

            for begin in range(0, len(self._rows) if self._run else 0, 1000):  # as many as a request may hold
                rows = self._rows[begin : begin + 1000]
                # With the tag a later start knows what is here, without the history of every metric.
                self._client.log_batch(self._run, metrics=rows, tags=[RunTag("last_step", str(rows[-1].step))])
        self._rows = []

    def show(self, name: str, picture: Path) -> None:
        """Put a picture among the run's artifacts."""
        with self._never_fatal():
            if self._run is not None:
                self._client.log_artifact(self._run, str(picture))

    def finish(self, exit_code: int = 0) -> None:
        """Send what is left, and close the run; the next start opens it again."""
        self.save()
        with self._never_fatal():
            if self._run is not None:
                self._client.set_terminated(self._run, "FAILED" if exit_code else "FINISHED")


class WeightsAndBiases(_Server):
    """A page on Weights & Biases with one run id for all starts; falls back to offline, never stops the training.

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

    service = "Weights & Biases"

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
        super().__init__()
        self._arguments = {"project": project, "name": name, "dir": str(save_dir), "entity": entity}
        self._offline = offline
        self._timeout_s = timeout_s

    def resume_from(self, folder: RunFolder, step: int, record: Mapping[str, Any]) -> None:
        """Open the run of this id, and send the rows of `metrics.csv` that its page lacks: offline all of them."""
        with self._never_fatal():
            self._run = self._open(folder.run_id)
            self._run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            self._run.config.update(dict(record), allow_val_change=True)
            self._send_again(folder, 0, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log under the run's own step, so that the server can tell what it has already."""
        with self._never_fatal():
            if self._run is not None and (step is None or step >= self._run.starting_step):
                self._run.log({**metrics, "trainer/global_step": step}, step=step)

    def show(self, name: str, picture: Path) -> None:
        """Put a picture on the page."""
        import wandb  # noqa: PLC0415  (takes a second, and most runs do without)

        with self._never_fatal():
            if self._run is not None:
                self._run.summary[name] = wandb.Image(str(picture))

    def finish(self, exit_code: int = 0) -> None:
        """Send what is left, for as long as it may take, and close the run; the next start opens it again."""
        if self._run is None:
            return
        folder, offline = self._run.settings.sync_dir, self._run.offline
        with self._never_fatal():
            try:
                self._run.finish(exit_code=exit_code)
            except TimeoutError:
                logger.warning(
                    "Weights & Biases did not take everything within %g s; the next start of this run sends what is "
                    "missing, and so does: wandb sync %s", self._timeout_s, folder,
                )  # fmt: skip
        if offline:
            logger.info("tracked offline; to upload it: wandb sync %s", folder)

    def _open(self, run_id: str) -> Any:
        import wandb  # noqa: PLC0415

        limits = dict.fromkeys(("init_timeout", "login_timeout", "finish_timeout"), self._timeout_s)
        options = {**limits, "finish_timeout_raises": True, **_WANDB_HIDES}
        settings = wandb.Settings(**{name: value for name, value in options.items() if hasattr(wandb.Settings(), name)})

        def init(mode: Any) -> Any:
            return wandb.init(id=run_id, resume="allow", mode=mode, settings=settings, **self._arguments)  # type: ignore[arg-type]

        mode = "offline" if self._offline else os.environ.get("WANDB_MODE", "online")
        if mode != "online":
            return init(mode)
        try:
            return init(mode)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning(
                "Weights & Biases cannot be reached (%s): tracking offline. `wandb login` helps if you are not "
                "logged in; `wandb sync` uploads the run later", reason,
            )  # fmt: skip
            wandb.teardown()  # else the id counts as taken
            return init("offline")
