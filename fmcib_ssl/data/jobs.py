"""A function over many items, in processes that may die: whatever kills one costs one item, not the night."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from fmcib_ssl.data.processes import end_with_parent

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_jobs(
    work: Callable[[Item], Result], items: Iterable[Item], num_workers: int, killed: Callable[[Item], Result]
) -> Iterator[tuple[Item, Result]]:
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
    waiting, suspects = deque(items), deque[Item]()
    while waiting or suspects:
        alone = bool(suspects)
        queue, width = (suspects, 1) if alone else (waiting, num_workers)
        in_work: dict[Future[Result], Item] = {}
        # Started afresh, not forked: threads of the libraries in use do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(width, len(queue)), mp_context=context, initializer=_start_worker) as pool:
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


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets us finish our item
    end_with_parent()  # a pool's workers would otherwise wait for work for ever
