"""Signals, as a process and its children get them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

LISTEN = "import os, signal, sys, time\nfrom fmcib_ssl.training import signals\nsignals.listen()\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that sends signals to itself; an exit by `Stopped` has its code."""
    body = "".join(f"    {line}\n" for line in code.splitlines())
    program = (
        f"{LISTEN}try:\n{body}except signals.Stopped as stopped:\n    print(stopped)\n    sys.exit(stopped.exit_code)\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=250)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 75), ("SIGHUP", 129)])
@pytest.mark.parametrize("starting", [False, True])
def test_before_training_it_ends_the_process(name: str, code: int, starting: bool) -> None:
    """At once or, where an exception in the midst of an import may be lost, when that is done."""
    begin = "signals.listen(starting=True)\n" * starting
    imported = "print('imported', flush=True)\nsignals.listen()\n" * starting
    result = run(f"{begin}os.kill(os.getpid(), signal.{name})\n{imported}time.sleep(30)")
    expected = "imported\n" * starting + f"stopped by {name}\n"
    assert (result.returncode, result.stdout, result.stderr) == (code, expected, "")


DEFERRED = "with signals.deferred():\n    "
FORKED = (
    "child = os.fork()\nif child == 0:\n    os.kill(os.getpid(), signal.{})\n    os._exit(7)\n"
    "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
)
#: Code, exit code, what is printed, and what stands in the errors.
CASES: dict[str, tuple[str, int, str, str]] = {
    "in training it is remembered": (
        DEFERRED + "for name in ('USR1', 'TERM'): os.kill(os.getpid(), signal.Signals['SIG' + name])\n"
        "    print(signals.received().name)",
        0, "SIGUSR1\n", "SIGUSR1: saving after this step",
    ),
    "a second Ctrl-C interrupts": (
        DEFERRED + "os.kill(os.getpid(), signal.SIGINT)\n    print('goes on', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(30)",
        -signal.SIGINT, "goes on\n", "Ctrl-C again",
    ),
    "one that came where no exception could be raised counts": (
        "signals._received = signal.SIGTERM\nwith signals.deferred(): print('trained')",
        143, "stopped by SIGTERM\n", "",
    ),
    "handlers of others, such as Lightning's, are taken back": (
        "signal.signal(signal.SIGTERM, print)\nsignals.take_back()\nos.kill(os.getpid(), signal.SIGTERM)",
        143, "stopped by SIGTERM\n", "",
    ),
    "Ctrl-C while starting ends without a word": (
        "signals.listen(starting=True)\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)", 130, "", "",
    ),
    "while it ends another changes nothing": (  # Slurm sends SIGTERM some time after SIGUSR1
        "try:\n"
        "    with signals.deferred():\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "        raise signals.Stopped(signals.received())\n"
        "finally:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    signals.ignore()\n"
        "    for name in ('INT', 'TERM', 'USR2'): os.kill(os.getpid(), signal.Signals['SIG' + name])",
        75, "stopped by SIGUSR1\n", "saving after this step",
    ),
    "a forked child does not hear what a scheduler announces": (FORKED.format("SIGUSR1"), 0, "7\n", ""),
    "a forked child ends by SIGTERM as any process": (FORKED.format("SIGTERM"), 0, f"{-signal.SIGTERM}\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_a_signal_does(case: str) -> None:
    code, returncode, printed, error = CASES[case]
    result = run(code)
    assert (result.returncode, result.stdout) == (returncode, printed), result.stderr
    assert error in result.stderr and bool(result.stderr) == bool(error)
    assert "Traceback" not in result.stderr or returncode == -signal.SIGINT


def test_what_was_ignored_stays_so() -> None:
    program = (
        f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{LISTEN}os.kill(os.getpid(), signal.SIGHUP)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=250).returncode == 0


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_worker_ends_when_its_parent_is_killed(method: str, tmp_path: Path) -> None:
    """A fork server outlives the parent as long as one of its workers does."""
    program = (
        "import multiprocessing, os, time\nfrom fmcib_ssl.data.processes import shield_worker\n"
        "def work(ready):\n"
        "    shield_worker()\n"
        "    ready.set()\n"
        "    time.sleep(120)\n"
        "if __name__ == '__main__':\n"
        f"    context = multiprocessing.get_context('{method}')\n"
        "    ready = context.Event()\n"
        "    worker = context.Process(target=work, args=(ready,))\n"
        "    worker.start()\n"
        "    ready.wait(60)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    file = tmp_path / "main.py"
    file.write_text(program)
    # All that it has started hold its output open; so this waits for them too.
    result = subprocess.run([sys.executable, file], stdout=subprocess.PIPE, check=False, timeout=250)
    assert result.returncode == -signal.SIGKILL


def test_a_rank_ends_when_its_launcher_is_killed() -> None:
    rank = (
        "import time\nfrom fmcib_ssl.data.processes import end_with_parent\n"
        "end_with_parent()\nprint(flush=True)\ntime.sleep(120)"
    )
    launcher = (
        "import os, subprocess, sys\n"
        f"rank = subprocess.Popen([sys.executable, '-c', {rank!r}], stdout=subprocess.PIPE, stderr=2)\n"
        "rank.stdout.readline()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    # The rank holds stderr open; so this waits for it too.
    result = subprocess.run([sys.executable, "-c", launcher], stderr=subprocess.PIPE, check=False, timeout=250)
    assert result.returncode == -signal.SIGKILL


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_is_deaf_from_its_first_moment(method: str, tmp_path: Path) -> None:
    """Signals that came before it could say so wait, and then mean nothing."""
    program = (
        "import multiprocessing, os, signal, time\nfrom fmcib_ssl.data.processes import held, shield_worker\n"
        "from fmcib_ssl.training import signals\n"
        "def work():\n"
        "    shield_worker()\n"
        "    time.sleep(0.3)\n"
        "    raise SystemExit(5)\n"
        "if __name__ == '__main__':\n"
        "    signals.listen()\n"
        f"    worker = multiprocessing.get_context('{method}').Process(target=work)\n"
        "    with held(): worker.start()\n"
        "    for name in ('USR1', 'USR2', 'INT', 'TERM'): os.kill(worker.pid, signal.Signals['SIG' + name])\n"
        "    worker.join(30)\n"
        "    print(worker.exitcode)\n"
    )
    file = tmp_path / "main.py"
    file.write_text(program)
    result = subprocess.run([sys.executable, file], capture_output=True, text=True, check=False, timeout=250)
    assert result.stdout == "5\n", result.stderr
