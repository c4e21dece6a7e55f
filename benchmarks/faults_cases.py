"""A case: one run that is killed a few times by one kind of fault, then left in peace, then looked at."""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from faults_compare import differences_of_runs, differences_of_stores, is_saving, scans_done, steps_logged, steps_saved
from faults_runs import (
    NUM_STEPS,
    PATIENCE_S,
    SAVE_EVERY,
    TRAIN,
    TWO_RANKS,
    DeathTrap,
    HangError,
    Started,
    send,
    start,
    start_ranks,
)

from fmcib_ssl.io import write_atomically

NUM_SCANS = 4
#: What a launcher gives the ranks that are left when one is gone, before SIGTERM, and before SIGKILL.
LAUNCHER_S = 20.0
#: What a run whose data worker was killed has to end.
WORKER_S = 10.0
#: What a stopped process may exit with: its signal's code, or 0 because it was done before.
CODES = {signal.SIGTERM: (143, 0), signal.SIGUSR1: (75, 0), signal.SIGINT: (130, 0), signal.SIGKILL: (-9, 0)}
#: Where a kill strikes within a save: before there is a file, before its renaming, before `last.ckpt` names it, before
#: the oldest is removed; None: while it is written.
SAVE_MOMENTS = (
    ("open", r"\.step-.*\.tmp"),
    None,
    None,
    ("os.rename", r"\.step-.*\.tmp"),
    ("os.symlink", r"\.last\.ckpt\.tmp"),
    ("os.remove", r"step-.*\.ckpt"),
)
#: The same for the results: before the encoder's file, its renaming, the picture of the curves, the last of `run.json`.
END_MOMENTS = (
    ("open", r"\.encoder\.safetensors\..*", 1),
    ("os.rename", r"\.encoder\.safetensors\..*", 1),
    ("open", r"curves\.png", 1),
    ("os.rename", r"\.run\.json\..*", 4),
)


class Case:
    """One run, its command, and how it is killed; everything is drawn from the seed, the kind and the number.

    Args:
        kind: of fault, a key of `faults.KINDS`.
        number: of the case among those of its kind.
        most: kills that are still wanted.
        seed: of all cases.
        workspace: holds what is compared with, and a folder for each case until it has ended well.
    """

    def __init__(self, kind: str, number: int, most: int, seed: int, workspace: Path) -> None:
        self.kind, self.workspace = kind, workspace
        self.draw = random.Random(f"{seed} {kind} {number}")
        self.num_kills = min(self.draw.randint(3, 5), most)
        name = f"{re.sub('[^A-Za-z0-9]+', '_', kind)}-{number:03d}"
        self.folder, self.file = workspace / "cases" / name, workspace / "done" / f"{name}.json"
        self.is_prepare, self.is_ranks = kind.startswith("prepare"), "rank" in kind
        self.is_worker, self.start_method = "worker" in kind, kind.partition("worker, ")[2] or "fork"
        self.run = self.folder / ("store" if self.is_prepare else "run")
        self.genuine = "Lightning" in kind or "Python" in kind or (kind.startswith("SIG") and number % 4 == 1)
        self.kills: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.begun: list[Started] = []
        self.num_starts = 0
        self.disk_was_full = False

    def result(self) -> dict[str, Any]:
        """Do it, unless it is done."""
        if self.file.is_file():
            found: dict[str, Any] = json.loads(self.file.read_text())
            return found
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        began = time.monotonic()
        try:
            while len(self.kills) < self.num_kills and self.strike():
                pass
            self.finish()
        except HangError as error:
            self.problems.append(str(error))
        record = {
            "kind": self.kind, "kills": self.kills, "starts": self.num_starts, "problems": self.problems,
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        write_atomically(self.file, json.dumps(record, indent=1))
        if not self.problems:
            shutil.rmtree(self.folder)
        return record

    def finish(self) -> None:
        """Start it until it ends, wait for what it has started, and compare."""
        for _ in range(3):
            started = self.start(genuine=False)
            if {one.wait(5 * PATIENCE_S) for one in started} == {0}:
                break
        else:
            raise HangError(f"the same command does not come to an end: {started[0].log}")
        for one in self.begun:
            one.wait_for_orphans()
        if self.is_prepare:
            self.problems += differences_of_stores(self.run, self.workspace / "store")
        else:
            self.problems += differences_of_runs(self.run, self.workspace / ("two_ranks" if self.is_ranks else "run"))

    def start(self, *, genuine: bool, trap: DeathTrap | None = None) -> list[Started]:
        """The command of this case, the same but for the number of workers."""
        self.num_starts += 1
        log = self.folder / f"{self.num_starts:02d}.log"
        if self.is_prepare:
            arguments = prepare_arguments(self.workspace, self.run, num_workers=2 * (self.draw.random() < 0.25))
            started = [start("scripts/prepare.py", arguments, log)]
        else:
            workers = 2 if self.is_worker else 0 if self.is_ranks else self.draw.choice([0, 0, 0, 2])
            arguments = train_arguments(self.workspace, self.run, num_workers=workers)
            if "Lightning" in self.kind:
                started = [start("train.py", [*arguments, *TWO_RANKS], log, genuine=True)]
            elif self.is_ranks:
                started = start_ranks(arguments, log)
            else:
                method = self.start_method
                started = [start("train.py", arguments, log, genuine=genuine, trap=trap, start_method=method)]
        self.begun += started
        return started

    def strike(self) -> bool:
        """Start, and kill at a random moment; gives whether there is something left to do."""
        if self.is_finished():
            return False
        before, self.disk_was_full = self.done(), False
        trap = self._trap()
        started = self.start(genuine=self.genuine, trap=trap)
        main = started[0]
        if trap is not None:
            main.wait_until(lambda: False, self.done)
            if main.wait() == -signal.SIGKILL or self._died().exists():
                where = self.where(before) if self.is_worker else "save" if "save" in self.kind else "end"
                self._note(started, signal.SIGKILL, [main.pid], where, self.done())
                return True
        else:
            self._wait_for_moment(main, before)
            where, done = self.where(before), self.done()
            signum, pids = (signal.SIGKILL, []) if main.code() is not None else self._fault(started)
            if pids or (self.kind == "disk full" and self.disk_was_full):
                for pid in pids:
                    send(pid, signum)
                self._note(started, signum, pids, where, done)
                return True
        if {one.wait() for one in started} != {0}:  # it was quicker
            raise HangError(f"it ended by itself, and not well: {main.log}")
        return False

    def done(self) -> int:
        """Steps in the metrics, or scans in the store."""
        return scans_done(self.run) if self.is_prepare else steps_logged(self.run)

    def is_finished(self) -> bool:
        """Whether it says so itself."""
        file, key = ("store.json", "complete") if self.is_prepare else ("run.json", "finished")
        return (self.run / file).is_file() and bool(json.loads((self.run / file).read_text())[key])

    def where(self, before: int) -> str:
        """What the run is about, going by its files."""
        if any(self.run.rglob(".*.tmp")) if self.is_prepare else is_saving(self.run):
            return "save"
        done, saved = self.done(), before if self.is_prepare else steps_saved(self.run)
        if done >= (NUM_SCANS if self.is_prepare else NUM_STEPS):
            return "end"
        return "start" if done <= min(before, saved) else "step"

    def _died(self, number: int | None = None) -> Path:
        """Where a worker that a trap kills in a start says when that was."""
        return self.folder / f"died-{number or self.num_starts}"

    def _trap(self) -> DeathTrap | None:
        if self.kind == "SIGKILL in a save" and not self.genuine:
            moment = self.draw.choice(SAVE_MOMENTS)
            return moment and DeathTrap(*moment, self.draw.randint(1, 2))
        if "hands over" in self.kind:  # each of a worker's 6 batches has 6 tensors
            return DeathTrap("socket.sendmsg", "", self.draw.randint(1, 30), self._died(self.num_starts + 1))
        return DeathTrap(*self.draw.choice(END_MOMENTS)) if "results" in self.kind else None

    def _wait_for_moment(self, main: Started, before: int) -> None:
        """Wait until it is time to kill, or the process has ended."""
        draw = self.draw
        by_clock = "Python" in self.kind or (draw.random() < 0.25 and not self.is_worker)
        if not self.is_prepare:
            main.wait_until(main.listens)  # before that, a twentieth of a second, Python itself is starting
        moment = time.monotonic() + (draw.uniform(0, 6) if by_clock else 5 * PATIENCE_S)
        saved = before if self.is_prepare else steps_saved(self.run)
        wanted = saved + draw.randint(0, 1 if self.is_prepare else 4)
        if self.kind == "SIGKILL in a save":
            main.wait_until(lambda: self.done() > saved and is_saving(self.run), self.done, pause_s=0.0002)
            time.sleep(draw.uniform(0, 0.004))
            return

        def so() -> bool:
            return time.monotonic() > moment or (not by_clock and saved < wanted <= self.done() != before)

        if wanted == saved and self.is_worker:  # before the first step
            main.wait_until(lambda: bool(main.workers()))
        if wanted == saved and not by_clock:
            moment = time.monotonic() + draw.uniform(0, 3)
        main.wait_until(so, self.done)
        time.sleep(draw.uniform(0, 0.15))

    def _fault(self, started: list[Started]) -> tuple[signal.Signals, list[int]]:
        """What is sent, and to whom."""
        main, draw = started[0], self.draw
        children = main.children()
        if self.is_worker:
            workers = main.workers()
            return signal.SIGKILL, draw.sample(workers, min(len(workers), 1))
        if "Lightning" in self.kind:
            return signal.SIGKILL, [draw.choice([main.pid, *children])]
        if self.is_ranks:
            return signal.SIGKILL, [draw.choice(started).pid]
        if self.kind == "disk full":
            self._fill_the_disk(main)
            return signal.SIGKILL, [main.pid] * draw.randint(0, 1)
        if "Python" in self.kind:
            signum = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        else:
            signum = signal.Signals[self.kind.removeprefix("prepare: ").split()[0]]
        if not self.is_prepare and signum in (signal.SIGTERM, signal.SIGUSR1) and draw.random() < 0.5:
            return signum, [main.pid, *children]  # Slurm sends it to every process
        return signum, [main.pid]

    def _fill_the_disk(self, main: Started) -> None:
        """No file may grow beyond a part of a checkpoint; for some steps, or until the process ends."""
        size = (self.workspace / "run" / "checkpoints" / "last.ckpt").stat().st_size
        unlimited = resource.RLIM_INFINITY
        resource.prlimit(main.pid, resource.RLIMIT_FSIZE, (int(size * self.draw.uniform(0.2, 0.95)), unlimited))
        self.disk_was_full = True
        steps = self.done() + self.draw.randint(2, 6)
        main.wait_until(lambda: self.done() >= steps, self.done)
        if self.draw.random() < 0.5 and main.code() is None:
            resource.prlimit(main.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))

    def _note(self, started: list[Started], signum: signal.Signals, pids: list[int], where: str, done: int) -> None:
        """Wait for the end and write down what was seen."""
        died, by_launcher = self._died(), False
        began = float(died.read_text()) if died.exists() else time.monotonic()
        for one in started:
            if len(started) > 1 and not one.ends_within(LAUNCHER_S):
                by_launcher = True
                send(one.pid, signal.SIGTERM)
        for one in started:
            if by_launcher and not one.ends_within(LAUNCHER_S):  # its handler may wait for a collective
                send(one.pid, signal.SIGKILL)
        codes = [one.wait() for one in started]
        seconds, log = round(time.monotonic() - began, 2), started[0].log
        if self.is_worker and codes[0] and (codes[0] != 1 or b"error: data worker" not in log.read_bytes()):
            self.problems.append(f"exit code {codes[0]} after a worker's death, or not a word of it: {log}")
        if self.is_worker and codes[0] and seconds > WORKER_S:  # else the worker was no longer needed
            self.problems.append(f"{seconds} s from a worker's death to the end: {log}")
        lost = 0 if self.is_prepare else max(0, self.done() - steps_saved(self.run))
        is_whole_run = self.kind in ("SIGKILL", "SIGTERM", "SIGUSR1") or "Python" in self.kind
        if is_whole_run and codes[0] not in CODES[signum]:
            self.problems.append(f"exit code {codes[0]} after {signum.name}: {log}")
        if is_whole_run and b"Traceback" in log.read_bytes():
            self.problems.append(f"a traceback after {signum.name}: {log}")
        allowed = 0 if is_whole_run and signum != signal.SIGKILL and where != "start" else SAVE_EVERY
        if lost > allowed and self.kind != "disk full":
            self.problems.append(f"{lost} steps are lost after {signum.name}: {log}")
        if self.is_prepare and self.done() < done:
            self.problems.append(f"{done - self.done()} finished scans are lost: {log}")
        self.kills.append({
            "signal": signum.name if pids else None, "where": where, "done": done, "lost": lost, "codes": codes,
            "seconds": seconds, "genuine": self.genuine, "by_launcher": by_launcher,
        })  # fmt: skip


def train_arguments(workspace: Path, run: Path, *, num_workers: int) -> list[str]:
    """Of `train.py`."""
    return [*TRAIN, f"data.store={workspace / 'store'}", f"hardware.num_workers={num_workers}", f"hydra.run.dir={run}"]


def prepare_arguments(workspace: Path, store: Path, *, num_workers: int) -> list[str]:
    """Of `scripts/prepare.py`."""
    table = workspace / "phantom" / "annotations.csv"
    return [f"annotations={table}", f"store={store}", f"num_workers={num_workers}", "sheet_lesions=0"]
