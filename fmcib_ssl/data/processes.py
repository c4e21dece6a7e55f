"""Processes that a run starts: signals are for the process that trains, and whatever ends that ends them.

Imports little, since `train.py` listens to signals before it imports anything slow.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

#: What asks a run to stop. Windows has two of them.
STOP_SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


@contextmanager
def held(signums: Sequence[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
    """Keep signals waiting, for this process and for those it starts, until the end of the block.

    A process started meanwhile inherits that and lets them in with `shield_worker`: there is no moment in which a
    signal to all processes of a job would kill it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker  # noqa: PLC0415

    resource_tracker.ensure_running()  # when it is started it lets signals in that were to wait
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signums)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield_worker() -> None:
    """Make a data worker deaf to what is meant for its parent, which needs it up to the next step.

    The parent ends it with SIGKILL; so does the end of the parent.
    """
    end_with_parent()
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_with_parent() -> None:
    """Make this process end when the one that wants its work does, however that ends.

    torch's data workers go by the number of the process they were forked from; by a fork server that is not the parent.
    A rank that its launcher leaves behind would wait half an hour for the others.
    """
    import multiprocessing  # noqa: PLC0415
    import threading  # noqa: PLC0415
    import time  # noqa: PLC0415

    parent, parent_pid = multiprocessing.parent_process(), os.getppid()

    def wait() -> None:
        if parent is not None:
            parent.join()
        while parent is None and os.getppid() == parent_pid:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
