"""Signals that ask a run to stop: remembered while it trains, and acted on between two steps.

`train.py` listens before it imports anything slow; what comes in an import is remembered until its end. Until training
begins there is nothing to save, and a signal ends the process at once; while it trains, `received()` is asked between
two steps (`training/checkpoints.py`). Needs nothing but a little of the standard library.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fmcib_ssl.data import STOP_SIGNALS

#: What the process exits with when it was stopped: 128 + the signal's number, as a shell would say; but 75
#: (`EX_TEMPFAIL`, "try again later") for the signals by which a scheduler announces the end of a job's time.
EXIT_CODES = {signum: 75 if signum.name.startswith("SIGUSR") else 128 + signum for signum in STOP_SIGNALS}

_received: signal.Signals | None = None
_starting = False
_deferred = False
_listener = 0  # the process that listens; what it forks does not


class Stopped(BaseException):
    """A signal has ended the run. Not an `Exception`, so that handlers of errors do not catch it.

    Attributes:
        signum: what was received.
        exit_code: of the process.
        acted_on: whether the run has been saved and requeued; False before training begins.
    """

    def __init__(self, signum: signal.Signals, exit_code: int | None = None, *, acted_on: bool = False) -> None:
        super().__init__(f"stopped by {signum.name}")
        self.signum = signum
        self.exit_code = EXIT_CODES[signum] if exit_code is None else exit_code
        self.acted_on = acted_on


def listen(*, starting: bool = False) -> None:
    """Take over the signals in `EXIT_CODES` for this process; to be called in its main thread.

    One that is ignored (`nohup`, a job in the background) stays so.

    Args:
        starting: imports follow, in which an exception may be lost: remember signals until the next call. Ctrl-C
            ends the process all the same.

    Raises:
        Stopped: one was received before.
    """
    global _listener, _starting
    _listener, _starting = os.getpid(), starting
    take_back()
    if _received is not None:
        raise Stopped(_received)


def take_back() -> None:
    """Put the handlers in again, if this process listens and others were put in their place."""
    if os.getpid() == _listener:
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, _handle)


def ignore() -> None:
    """Ignore signals: the process is about to end."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def received() -> signal.Signals | None:
    """What has asked for an end so far."""
    return _received


@contextmanager
def deferred() -> Iterator[None]:
    """Only remember signals; whoever trains asks `received()`. A second Ctrl-C still interrupts at once.

    Raises:
        Stopped: one was received before.
    """
    global _deferred  # noqa: PLW0603
    _deferred = True
    stopped = False
    try:
        if _received is not None:
            raise Stopped(_received)
        yield
    except Stopped:
        stopped = True
        raise
    finally:
        _deferred = stopped  # then the process is about to end, and another signal changes nothing


def _handle(signum: int, frame: FrameType | None) -> None:
    global _received  # noqa: PLW0603
    if os.getpid() != _listener:
        # Forked from the listener, and not yet, or never, told what to do: as any process would. What a scheduler
        # announces to every process of a job is not meant for it.
        if EXIT_CODES[signal.Signals(signum)] != 75:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        return
    again = _received is not None
    _received = _received or signal.Signals(signum)
    if _starting:
        if signum == signal.SIGINT:
            os._exit(EXIT_CODES[signal.SIGINT])
    elif _deferred:
        if signum == signal.SIGINT and again:
            raise KeyboardInterrupt
        if not again and _speaks():
            hint = "; Ctrl-C again stops without saving" if signum == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(signum).name}: saving after this step, then stopping{hint}\n".encode())
    elif signum == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise Stopped(_received)


def _speaks() -> bool:
    """Whether this is the process that talks to the user; known from what launchers set."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return all(rank == "0" for rank in ranks)
