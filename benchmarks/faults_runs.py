"""Commands that are going to be killed: started in sessions of their own, watched, and taken away."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
NUM_STEPS, SAVE_EVERY = 12, 2
#: What does not end, or does nothing, for so long hangs.
PATIENCE_S = 60.0

TRAIN = [
    "+experiment=ct_infonce",
    "encoder=small",
    "encoder.widths=[4,8,8,16]",
    "data.patch_size=[16,16,16]",
    "data.batch_size=2",
    f"trainer.max_epochs={NUM_STEPS // 3}",
    "optimizer.base_lr=0.1",
    "contact_sheet_rows=0",
    "callbacks.progress.refresh_rate=0",
    f"callbacks.checkpoint.every_n_train_steps={SAVE_EVERY}",
]
TWO_RANKS = ["data.batch_size=1", "head.batch_norm=false", "hardware.devices=2"]

# A process that has imported everything, and computed nothing, is forked for each start: it begins within a second.
# Signals, files and sockets are real; some starts are genuine, `python train.py`, all the same.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "fmcib_ssl.run",
        "fmcib_ssl.training.config",
        "fmcib_ssl.augment",
        "fmcib_ssl.data.prepare",
    ]
)


class HangError(RuntimeError):
    """A process that should have ended, or gone on, did neither."""


@dataclass(frozen=True)
class DeathTrap:
    """Kill the process as it is about to do something for the n-th time, by Python's audit events.

    Attributes:
        event: of files, `open`, `os.rename`, `os.symlink`, `os.remove`; or `socket.sendmsg`, which a forked data worker
            does to hand over a tensor.
        name: a pattern that the file's name matches.
        number: which time, from 1.
        note: file that is told when it was, by the system's monotonic clock.
    """

    event: str
    name: str
    number: int
    note: Path | None = None

    def arm(self) -> None:
        """Set it in this process."""
        pattern, left = re.compile(self.name), [self.number]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event != self.event:
                return
            path = arguments[event == "os.symlink"]
            if not isinstance(path, str | os.PathLike) or pattern.fullmatch(Path(os.fspath(path)).name):
                left[0] -= 1
                if left[0] == 0:
                    if self.note is not None:
                        self.note.write_text(str(time.monotonic()))
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


@dataclass
class Started:
    """A command at work, in a session of its own; of several ranks each is one."""

    process: Any
    log: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def pid(self) -> int:
        """Of the process, and of its session."""
        return int(self.process.pid)

    def code(self) -> int | None:
        """The exit code, minus the signal that killed it, or None."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        code: int | None = self.process.exitcode
        return code

    def session(self) -> list[int]:
        """All processes of the session that are alive."""
        return [int(entry[0]) for entry in _processes() if int(entry[5]) == self.pid and entry[2] != "Z"]

    def listens(self) -> bool:
        """Whether it handles signals."""
        caught = re.search(rb"SigCgt:\s*(\w+)", _read(f"/proc/{self.pid}/status"))
        return caught is not None and bool(int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1)

    def workers(self) -> list[int]:
        """Data workers at work, whoever has started them."""
        return [int(entry[0]) for entry in _processes() if int(entry[5]) == self.pid and "pt_data_worker" in entry[1]]

    def children(self) -> list[int]:
        """Processes that it has started: data workers, ranks."""
        return [
            int(entry[0])
            for entry in _processes()
            if int(entry[3]) == self.pid and b"resource_tracker" not in _read(f"/proc/{entry[0]}/cmdline")
        ]

    def cpu_s(self) -> float:
        """Seconds that the session has computed."""
        ticks = sum(int(entry[13]) + int(entry[14]) for entry in _processes() if int(entry[5]) == self.pid)
        return ticks / os.sysconf("SC_CLK_TCK")

    def wait(self, limit_s: float = PATIENCE_S) -> int:
        """Wait for the end; gives the exit code.

        Raises:
            HangError: it does not come; the log has the stacks of all threads.
        """
        began = checked = time.monotonic()
        cpu_s = last_cpu_s = self.cpu_s()
        while (code := self.code()) is None:
            now = time.monotonic()
            if now > checked + limit_s / 2:
                used_s = self.cpu_s()
                # On a machine that many share, one that computes all it can is given longer.
                if now > began + limit_s and (used_s < last_cpu_s + 1 or used_s > cpu_s + limit_s / 2):
                    self.end()
                    raise HangError(f"still there {now - began:.0f} s after it should have ended: {self.log}")
                checked, last_cpu_s = now, used_s
            time.sleep(0.005)
        return code

    def wait_until(
        self, so: Callable[[], bool], progress: Callable[[], Any] = lambda: None, pause_s: float = 0.003
    ) -> bool:
        """Wait until something is so, or the process has ended; gives whether it is so.

        Raises:
            HangError: the process neither computes nor makes progress.
        """
        seen, since = (progress(), self.cpu_s()), time.monotonic()
        while self.code() is None:
            if so():
                return True
            if time.monotonic() - since > PATIENCE_S / 2:
                now = (progress(), self.cpu_s())
                if now[0] == seen[0] and now[1] - seen[1] < 0.1 and time.monotonic() - since > PATIENCE_S:
                    self.end()
                    raise HangError(f"nothing happened for {PATIENCE_S:.0f} s: {self.log}")
                if now[0] != seen[0] or now[1] - seen[1] >= 0.1:
                    seen, since = now, time.monotonic()
            time.sleep(pause_s)
        return False

    def wait_for_orphans(self) -> None:
        """Wait until nothing is left of the session; data workers take some seconds to see that their parent is gone.

        Raises:
            HangError: something is.
        """
        deadline = time.monotonic() + PATIENCE_S
        while left := self.session():
            if time.monotonic() > deadline:
                self.end()
                raise HangError(f"{len(left)} processes outlived the one that started them: {self.log}")
            time.sleep(0.02)

    def ends_within(self, seconds: float) -> bool:
        """Whether it has ended by then."""
        deadline = time.monotonic() + seconds
        while self.code() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.code() is not None

    def end(self) -> None:
        """Take it away, with everything it has started; stacks go to the log."""
        for signum in (signal.SIGABRT, signal.SIGKILL):
            for pid in self.session():
                send(pid, signum)
            time.sleep(1)


def start(
    script: str,
    arguments: list[str],
    log: Path,
    *,
    genuine: bool = False,
    trap: DeathTrap | None = None,
    environ: Mapping[str, str] | None = None,
    start_method: str = "fork",
) -> Started:
    """Begin `python SCRIPT ARGUMENTS`; what it prints goes to a file, and its data workers start as they are told."""
    if genuine:
        command = [sys.executable, "-X", "faulthandler", str(REPO / script), *arguments]
        with log.open("ab") as output:
            return Started(
                subprocess.Popen(
                    command, stdout=output, stderr=output, start_new_session=True, env={**os.environ, **(environ or {})}
                ),
                log,
            )
    process = _SERVER.Process(target=_run, args=([script, *arguments], log, trap, dict(environ or {}), start_method))
    process.start()
    return Started(process, log)


def start_ranks(arguments: list[str], log: Path) -> list[Started]:
    """Begin the two processes of a run, as a launcher that knows of them all would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    return [
        start(
            "train.py",
            [*arguments, *TWO_RANKS],
            log.with_suffix(f".{rank}.log"),
            environ={**common, "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def _run(command: list[str], log: Path, trap: DeathTrap | None, environ: dict[str, str], start_method: str) -> None:
    os.setsid()
    import torch  # noqa: PLC0415  (the process that forks has it; whoever asks for the fork does not)
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # noqa: PLC0415

    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    faulthandler.enable(sys.stderr)
    threads = int(re.findall(rb"Threads:\s+(\d+)", _read("/proc/self/status"))[0])
    if threads != 1:
        raise AssertionError(f"{threads} threads in a process that was just forked: it is not sound")
    os.environ.update(environ)
    rank_zero_only.rank = int(environ.get("LOCAL_RANK", 0))  # Lightning has looked before the fork
    torch.set_num_threads(1)
    multiprocessing.set_start_method(start_method, force=True)  # of its own workers; "fork" in `python train.py`
    sys.path.insert(0, str(REPO))
    sys.argv = [str(REPO / command[0]), *command[1:]]
    if trap is not None:
        trap.arm()
    runpy.run_path(sys.argv[0], run_name="__main__")


def send(pid: int, signum: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def _processes() -> Iterator[list[str]]:
    """`/proc/PID/stat` of all processes, split: pid, name, state, parent, group, session, ..., user and system time."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (text := _read(folder / "stat").decode(errors="replace")):
            head, _, tail = text.rpartition(")")
            yield [*head.split(" ", 1), *tail.split()]


def _read(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
