"""Data workers whose death ends the run: within seconds, with the reason, and never with a hang.

A worker that is killed may hold the lock of a queue or have written half a message, for which the training process
would wait for ever; by a fork server it is not even told. So a thread waits for the end of every worker. It interrupts
what the training process does, and ends that process if it does not end by itself.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fmcib_ssl.data.processes import held, shield_worker
from fmcib_ssl.types import SampleKey, UserError

logger = logging.getLogger(__name__)

#: Seconds after a worker's death within which the run ends by itself, or else is ended.
_END_WITHIN_S = 8.0
#: Seconds in which the watching thread learns of a death that a broken connection has told already.
_PATIENCE_S = 1.0

_RESUME = "What was saved is kept, and the same command resumes from it."
_CRASH = "A library has crashed: if it is always over the same lesion, look at its scan with check_data.py"
#: By the name of the signal that has killed a worker.
_REMEDIES = {
    "SIGKILL": "Lower num_workers or batch_size, or ask for more memory (Slurm: --mem)",
    "SIGBUS": "workers hand over batches in shared memory, and /dev/shm may be full. Lower num_workers (0 needs none) "
    "or batch_size, or in a container raise the limit: --shm-size 8g (docs/containers.md)",
    "SIGSEGV": _CRASH,
    "SIGABRT": _CRASH,
}


class WorkerDiedError(UserError, RuntimeError):
    """A data worker has died; the message says why, and over which lesion."""


class WatchedLoader(DataLoader[Any]):
    """A `DataLoader` whose workers are watched, leave signals to their parent, and end with it.

    Args:
        dataset: of keys that are a `SampleKey` or the number of a lesion.
        title: names a lesion by its number, for the message about a dead worker.
        rank: of this process among several, for the same message; None for one.
        num_workers: processes; 0 reads in this one, and there is nothing to watch.
        arguments: of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        title: Callable[[int], str] | None = None,
        rank: int | None = None,
        num_workers: int = 0,
        **arguments: Any,
    ) -> None:
        self.title, self.rank = title, rank  # by these names a trainer finds them that makes the loader anew
        self._watch: _Watch | None = None
        if num_workers:
            # Of each worker its process and what it has last begun to read, in memory that is shared with it.
            self._last_read = multiprocessing.RawArray("q", [-1, -1] * num_workers)
            dataset, arguments["worker_init_fn"] = _Noted(dataset, self._last_read), _start_worker
        super().__init__(dataset, num_workers=num_workers, **arguments)
        if num_workers:
            self.collate_fn = partial(_collate_shared, self.collate_fn)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names a class of its own
        """Deal out the epoch that is set when the first batch is asked for.

        A trainer that resumes makes the iterator before it sets the epoch, and workers would begin with epoch 0.

        Raises:
            WorkerDiedError: a worker has died.
        """
        before = set(multiprocessing.active_children())
        with held() if self.num_workers else nullcontext():
            batches = super().__iter__()  # starts the workers
        if started := set(multiprocessing.active_children()) - before:
            self._watch = _Watch(started, self._cause_of_death)
        try:
            while True:
                if self._watch:
                    self._watch.raise_death()
                yield next(batches)
        except StopIteration:
            return
        except (OSError, EOFError, RuntimeError) as error:
            if self._watch:
                self._watch.raise_death(error, _PATIENCE_S)
            raise

    def _cause_of_death(self, worker: BaseProcess) -> str:
        code, killer = worker.exitcode or 0, ""
        with suppress(ValueError):
            killer = signal.Signals(-code).name
        reason = f"was killed by {killer}" if killer else f"ended by itself, code {code}"
        if killer == "SIGKILL":
            reason += ", likely out of memory, unless somebody did it"
        lesion = dict(zip(self._last_read[::2], self._last_read[1::2], strict=True)).get(worker.pid or 0)
        last = "none" if lesion is None else f"number {lesion}"
        with suppress(Exception):  # a title must not hide what it is about
            last += f" ({self.title(lesion)})" if self.title and lesion is not None else ""
        whose = "" if self.rank is None else f" of rank {self.rank}"
        message = f"data worker{whose} (process {worker.pid}) {reason}. Last lesion that it began to read: {last}."
        return f"{message} {_RESUME} {_REMEDIES.get(killer, '')}".strip()


@contextmanager
def no_worker_left() -> Iterator[None]:
    """End the data workers that the block starts at its end, whatever ends it.

    Raises:
        WorkerDiedError: in place of any other error, if one of them has died.
    """
    before = set(_watches)
    try:
        yield
    except Exception as error:
        for watch in _watches - before:
            watch.raise_death(error)
        raise
    finally:
        _end_workers(_watches - before)


class _Watch:
    """Waits in a thread for the end of the workers of one loader; that of one that dies ends the run.

    Args:
        workers: that were started.
        cause_of_death: the message about a worker.
    """

    def __init__(self, workers: Collection[BaseProcess], cause_of_death: Callable[[BaseProcess], str]) -> None:
        self._workers, self._cause_of_death = workers, cause_of_death
        self._death: WorkerDiedError | None = None
        self._is_over = threading.Event()
        self._is_known = False  # to the main thread
        _watches.add(self)
        if threading.current_thread() is threading.main_thread():
            # In place of torch's, which may raise in the midst of a trainer's teardown.
            signal.signal(signal.SIGCHLD, _interrupt)
        threading.Thread(target=self._wait, name="fmcib_ssl workers", daemon=True).start()

    def raise_death(self, cause: BaseException | None = None, patience_s: float = 0.0) -> None:
        """Raise if a worker has died; not again over the error about it.

        Args:
            cause: an error that the death may have led to.
            patience_s: so long to wait for what the watching thread has to say.
        """
        deadline = time.monotonic() + patience_s
        while self._death is None and time.monotonic() < deadline:
            time.sleep(0.01)  # and no lock: a signal's handler may come in between
        if self._death is not None and self._death is not cause:
            self._is_known = True
            raise self._death from cause

    def interrupt(self) -> None:
        """In a signal's handler: raise, unless the error has been raised before."""
        if not self._is_known:
            self.raise_death()

    def end(self) -> None:
        """End the workers that are left."""
        self._is_over.set()
        _watches.discard(self)
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()
                worker.join(1)

    def _wait(self) -> None:
        alive = list(self._workers)
        while alive and not self._is_over.is_set():
            multiprocessing.connection.wait([worker.sentinel for worker in alive], timeout=0.5)
            if dead := [worker for worker in self._workers if worker.exitcode]:
                return self._end_run(dead[0])
            alive = [worker for worker in alive if worker.is_alive()]
        _watches.discard(self)
        return None

    def _end_run(self, worker: BaseProcess) -> None:
        if self._is_over.is_set():
            return
        self._death = WorkerDiedError(self._cause_of_death(worker))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGCHLD)  # whatever it waits for
        if not self._is_over.wait(_END_WITHIN_S):
            logger.critical("%s", self._death)
            logging.shutdown()
            os._exit(1)


class _Noted(Dataset[Any]):
    """Notes, where its parent sees it, which lesion a worker begins to read."""

    def __init__(self, dataset: Any, last_read: Any) -> None:
        self.dataset, self.last_read = dataset, last_read

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        if (worker := get_worker_info()) is not None:
            lesion = key.index if isinstance(key, SampleKey) else key
            self.last_read[2 * worker.id : 2 * worker.id + 2] = [os.getpid(), lesion]
        return self.dataset[key]


def _collate_shared(collate: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    """A batch whose tensors are in shared memory already.

    What a full /dev/shm raises here reaches the training process. The queue's thread, which would share them otherwise,
    drops the batch, and that is waited for in vain.
    """
    return apply_to_collection(collate(items), torch.Tensor, torch.Tensor.share_memory_)


_watches: set[_Watch] = set()


def _start_worker(_worker: int) -> None:
    """A worker is one core, where torch's own threads would fight over the others; signals are for its parent."""
    shield_worker()
    torch.set_num_threads(1)


def _interrupt(_signum: int, _frame: object) -> None:
    for watch in list(_watches):
        watch.interrupt()


def _end_workers(watches: Iterable[_Watch] = _watches) -> None:
    for watch in list(watches):
        watch.end()


atexit.register(_end_workers)  # it comes before Python waits for its children, as that was registered first
