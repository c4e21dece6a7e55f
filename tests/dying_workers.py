"""Data workers that die at an exact place."""

from __future__ import annotations

import os
import struct
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIGKILL
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import get_worker_info

from fmcib_ssl.augment import PublishedViews


def die_within_the_lock() -> None:
    """Not now, but as this worker hands over a batch: with a part of the message in the pipe, and the queue's lock."""

    def half(connection: Connection, message: Any) -> None:
        os.write(connection.fileno(), struct.pack("!i", len(message)) + bytes(message)[:3])
        os.kill(os.getpid(), SIGKILL)

    Connection._send_bytes = half  # type: ignore[attr-defined]


class DyingViews(PublishedViews):
    """The published views; their worker dies as it hands over a batch in the middle of a run, once.

    Args:
        fuse: a file; whoever takes it away dies.
        arguments: of `PublishedViews`.
    """

    def __init__(self, fuse: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.fuse = Path(fuse)
        self.num_made = 0

    def __call__(self, patches: Tensor, seeds: Tensor) -> Tensor:
        before, self.num_made = self.num_made, self.num_made + len(patches)
        if get_worker_info() is not None and before < 26 <= self.num_made and self.fuse.exists():
            self.fuse.unlink(missing_ok=True)
            die_within_the_lock()
        return super().__call__(patches, seeds)


class FailsOverAnError(L.Callback):
    """Raises in a step, and again when it is told of that."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise ArithmeticError("in a step")

    def on_exception(self, *_: Any) -> None:
        raise LookupError("over an error")
