"""Data workers whose death ends the run: within seconds, with the reason, and never with a hang.

A worker that is killed may hold the lock of a queue or have written half a message, for which the training process
would wait for ever; by a fork server it is not even told. So a thread waits for the end of every worker. It interrupts
what the training process does, and ends that process if it does not end by itself.
"""

from __future__ import annotations

import atexit
import copy
import logging
import multiprocessing.connection
import os
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fmcib_ssl.data.processes import held, shield_worker
from fmcib_ssl.types import SampleKey, UserError

logger = logging.getLogger(__name__)

#: Seconds after a worker's death within which the run ends by itself, or else is ended.
END_WITHIN_S = 8.0

_RESUME = "What was saved is kept, and the same command resumes from it. "
_MORE_MEMORY = "Lower num_workers or batch_size, or ask for more memory (Slurm: --mem)"
_SHARED_MEMORY = (
    "workers hand over batches in shared memory, and /dev/shm may be full. Lower num_workers (0 needs none) or "
    "batch_size, or in a container raise the limit: --shm-size 8g (docs/containers.md)"
)


class WorkerDiedError(UserError, RuntimeError):
    """A data worker has died; the message says which one, why, and over which lesion."""


class WatchedLoader(DataLoader[Any]):
    """A `DataLoader` whose workers are watched, leave signals to their parent, and end with it.

    Args:
        dataset: of keys that are a `SampleKey` or the number of a lesion.
        title: names a lesion by its number, for the message about a dead worker.
        rank: of this process among several, for the same message; None for one.
        num_workers: processes; 0 reads in this one, and there is nothing to watch.
        multiprocessing_context: how they start, `"fork"`, `"forkserver"` or `"spawn"`; None is Python's own.
        arguments: of `DataLoader`.

    Attributes:
        is_reading: whether somebody waits for a batch.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        title: Callable[[int], str] | None = None,
        rank: int | None = None,
        num_workers: int = 0,
        multiprocessing_context: Any = None,
        **arguments: Any,
    ) -> None:
        if isinstance(dataset, _Noted):  # a trainer makes the loaders that it predicts with anew
            dataset, multiprocessing_context = dataset.dataset, multiprocessing_context.get_start_method()
        self._crew = _Crew(num_workers, multiprocessing_context, title, rank) if num_workers else None
        if self._crew is not None:
            arguments |= {"multiprocessing_context": self._crew.context, "worker_init_fn": _start_worker}
            dataset = _Noted(dataset, self._crew.lesions)
        self.is_reading = False
        super().__init__(dataset, num_workers=num_workers, **arguments)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names a class of its own
        """Deal out the epoch that is set when the first batch is asked for.

        A trainer that resumes makes the iterator before it sets the epoch, and workers would begin with epoch 0.

        Raises:
            WorkerDiedError: a worker has died.
        """
        crew = self._crew
        try:
            with held() if crew else nullcontext():
                batches = super().__iter__()  # starts the workers
            if crew:
                crew.watch()
            while True:
                if crew:
                    crew.check()
                yield self._next(batches)
        except StopIteration:
            return
        except (OSError, EOFError, RuntimeError) as error:
            if crew:  # the end of a connection may be known before that of the process
                crew.check(patience_s=1.0, cause=error)
            raise

    def _next(self, batches: Iterator[Any]) -> Any:
        self.is_reading = True
        try:
            return next(batches)
        finally:
            self.is_reading = False


@contextmanager
def no_worker_left() -> Iterator[None]:
    """End the data workers that the block starts at its end, whatever ends it.

    Raises:
        WorkerDiedError: in place of any other error, if one of them has died.
    """
    before = set(_crews)
    try:
        yield
    except Exception as error:
        for crew in set(_crews) - before:
            crew.check(cause=error)
        raise
    finally:
        _end_workers(set(_crews) - before)


class _Crew:
    """The workers of one loader, and the thread that waits for their end.

    Attributes:
        context: starts them; what it makes can be relied on when a worker is killed.
        lesions: what each has last begun to read, shared with them; -1 for nothing.
    """

    def __init__(
        self, num_workers: int, method: str | None, title: Callable[[int], str] | None, rank: int | None
    ) -> None:
        base: Any = torch.multiprocessing.get_context(method)
        self.context = copy.copy(base)
        self.context.Process = partial(self._hire, base)
        self.context.Event = partial(_Flag, base)
        self.lesions: Any = base.RawArray("q", [-1] * num_workers)
        self._title, self._rank, self._pid = title, rank, os.getpid()
        self._workers: list[BaseProcess] = []
        self._num_watched = 0
        self._closed = threading.Event()
        self._kills = 0
        self._death: WorkerDiedError | None = None
        self._is_known = False  # to the main thread
        self._handler_before: Any = None

    def watch(self) -> None:
        """Watch the workers that were started since the last call."""
        started = self._workers[self._num_watched :]
        if not started:
            return
        self._num_watched = len(self._workers)
        self._kills = _memory_kills()
        _crews.add(self)
        if threading.current_thread() is threading.main_thread():
            # Not torch's, which may raise in the midst of a trainer's teardown; then Python waits for what is left.
            self._handler_before = signal.signal(signal.SIGCHLD, _interrupt)
        threading.Thread(target=self._wait, args=(started,), name="fmcib_ssl workers", daemon=True).start()

    def check(self, patience_s: float = 0.0, cause: BaseException | None = None) -> None:
        """Raise once for a worker that has died.

        Args:
            patience_s: so long to wait for what the watching thread has to say.
            cause: an error that the death may have led to.
        """
        deadline = time.monotonic() + patience_s
        while self._death is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._death is not None and self._death is not cause:
            self._is_known = True
            raise self._death from cause

    def interrupt(self) -> None:
        """In a signal's handler: raise, unless the error has been raised before."""
        if not self._is_known:
            self.check()

    def close(self) -> None:
        """End the workers that are left."""
        self._closed.set()
        if os.getpid() != self._pid:  # forked from the parent of the workers
            return
        in_main = threading.current_thread() is threading.main_thread()
        if in_main:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()
                worker.join(1)
        if in_main:
            signal.signal(signal.SIGCHLD, self._handler_before or signal.SIG_DFL)

    def _hire(self, base: Any, **arguments: Any) -> BaseProcess:
        worker: BaseProcess = base.Process(**arguments)
        self._workers.append(worker)
        return worker

    def _wait(self, workers: list[BaseProcess]) -> None:
        while not self._closed.is_set():
            alive = [worker for worker in workers if worker.is_alive()]
            if dead := [worker for worker in workers if worker.exitcode]:
                return self._end_run(dead[0])
            if not alive:
                break
            multiprocessing.connection.wait([worker.sentinel for worker in alive], timeout=0.5)
        return None

    def _end_run(self, worker: BaseProcess) -> None:
        if self._closed.is_set():
            return
        self._death = WorkerDiedError(self._obituary(self._workers.index(worker) % len(self.lesions), worker))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGCHLD)  # whatever it waits for
        if not self._closed.wait(END_WITHIN_S):
            logger.critical("%s", self._death)
            logging.shutdown()
            os._exit(1)

    def _obituary(self, number: int, worker: BaseProcess) -> str:
        code = worker.exitcode or 0
        reason, remedy = f"ended by itself, code {code}", ""
        if code < 0:
            with suppress(ValueError):
                reason = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            known = _memory_kills() > self._kills
            reason += ": out of memory, says the kernel" if known else ", likely out of memory, unless somebody did it"
            remedy = _MORE_MEMORY
        elif code == -signal.SIGBUS:
            remedy = _SHARED_MEMORY
        elif code in (-signal.SIGSEGV, -signal.SIGABRT):
            remedy = "A library has crashed: if it is always over the same lesion, look at its scan with check_data.py"
        lesion = self.lesions[number]
        last = f"number {lesion}" if lesion >= 0 else "none"
        with suppress(Exception):  # a title must not hide what it is about
            last += f" ({self._title(lesion)})" if self._title and lesion >= 0 else ""
        whose = "" if self._rank is None else f" of rank {self._rank}"
        return (
            f"data worker {number}{whose} (process {worker.pid}) {reason}. Last lesion that it began to read: {last}. "
            f"{_RESUME}{remedy}"
        ).strip()


class _Flag:
    """A `multiprocessing.Event` without a lock, which a worker that is killed could hold."""

    def __init__(self, context: Any) -> None:
        self._value = context.RawValue("b", 0)

    def set(self) -> None:
        self._value.value = 1

    def is_set(self) -> bool:
        return bool(self._value.value)


class _Noted(Dataset[Any]):
    """Notes, where its parent sees it, which lesion a worker begins to read."""

    def __init__(self, dataset: Any, lesions: Any) -> None:
        self.dataset, self.lesions = dataset, lesions

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        worker = get_worker_info()
        if worker is not None:
            self.lesions[worker.id] = key.index if isinstance(key, SampleKey) else key
        return self.dataset[key]


_crews: weakref.WeakSet[_Crew] = weakref.WeakSet()


def _start_worker(_worker: int) -> None:
    """A worker is one core, where torch's own threads would fight over the others; signals are for its parent."""
    shield_worker()
    torch.set_num_threads(1)


def _interrupt(_signum: int, _frame: object) -> None:
    for crew in list(_crews):
        crew.interrupt()


def _end_workers(crews: Iterable[_Crew] = _crews) -> None:
    for crew in set(crews):
        crew.close()
        _crews.discard(crew)


atexit.register(_end_workers)  # it comes before Python waits for its children, as that was registered first


def _memory_kills(root: Path = Path("/")) -> int:
    """Processes of this job that the kernel has killed for want of memory so far, as its cgroup (version 2) counts."""
    kills = 0
    with suppress(OSError):  # the machine's own group does not count
        (group,) = re.findall(r"^0::/(.*)$", (root / "proc/self/cgroup").read_text(), re.MULTILINE) or [""]
        events = (root / "sys/fs/cgroup" / group.lstrip("/") / "memory.events").read_text()
        kills = sum(map(int, re.findall(r"^oom_kill (\d+)", events, re.MULTILINE)))
    return kills
