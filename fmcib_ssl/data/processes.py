"""Processes that a run starts: work that is spread over them, signals that are not for them, and their end.

`train.py` listens to signals before it imports anything slow, so this imports little.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TypeVar

logger = logging.getLogger(__name__)

#: Why a worker was killed, as far as that is known, in a message.
KILLED = "its process was killed twice: most likely there is too little memory"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

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
    parent, parent_pid = multiprocessing.parent_process(), os.getppid()

    def follow() -> None:
        if parent is not None:
            parent.join()
        while parent is None and os.getppid() == parent_pid:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_jobs(
    work: Callable[[_Item], _Result], items: Iterable[_Item], num_workers: int, killed: Callable[[_Item], _Result]
) -> Iterator[tuple[_Item, _Result]]:
    """Yield each item with its result, in the order in which they are done.

    If a worker is killed (the kernel does so when memory is short), its pool is lost. Every item that was in work then
    is tried once more, alone; the one that kills its worker again is given up, and the others go on.

    Args:
        work: a function that can be pickled, as can items and results.
        items: what to do.
        num_workers: processes, each with one item at a time; 0 works in this one.
        killed: makes the result of an item that was given up.

    Raises:
        Exception: what `work` raised; items that were in work then are finished first.
        BrokenProcessPool: workers cannot even start.
    """
    if num_workers == 0:
        yield from ((item, work(item)) for item in items)
        return
    waiting, suspects = deque(items), deque[_Item]()
    while waiting or suspects:
        alone = bool(suspects)
        queue, width = (suspects, 1) if alone else (waiting, num_workers)
        in_work: dict[Future[_Result], _Item] = {}
        # Started afresh, not forked: threads of the libraries in use do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(width, len(queue)), mp_context=context, initializer=_start_job_worker) as pool:
            pool.submit(os.getpid).result()  # before blaming an item: can a worker start at all?
            try:
                while queue or in_work:
                    while queue and len(in_work) < width:
                        future = pool.submit(work, queue[0])
                        in_work[future] = queue.popleft()
                    for future in wait(in_work, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield in_work.pop(future), result
            except BrokenProcessPool:
                if not alone:
                    logger.warning(
                        "a worker was killed, most likely for want of memory (fewer of %d workers may help): "
                        "trying what was in work again, one by one", num_workers,
                    )  # fmt: skip
                for future, item in in_work.items():
                    if future.done() and future.exception() is None:
                        yield item, future.result()
                    elif alone:
                        yield item, killed(item)
                    else:
                        suspects.append(item)


def _start_job_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets us finish our item
    end_with_parent()  # a pool's workers would otherwise wait for work for ever
