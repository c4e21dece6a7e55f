"""What memory there is, and when a GPU's is not enough: the batch that would fit, from measured memory a lesion."""

from __future__ import annotations

import contextlib
import gc
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

#: Of what is free, left for fragments and workspaces.
SPARE = 0.1
_STATUS = Path("/proc/self/status")


def peak_memory(device: torch.device) -> int:
    """The most bytes that were held so far: on a GPU in torch's tensors, else by this process (0: unknown)."""
    if device.type == "cuda":
        peak: int = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["peak"]
        return peak
    with contextlib.suppress(OSError):
        # Not `getrusage`: in Linux a program starts with the peak of the one that has started it.
        return _number_after("VmHWM:", _STATUS.read_text()) * 1024
    try:
        import resource  # noqa: PLC0415
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_host_peak() -> None:
    """Let the kernel measure the most memory of this process anew; where it does not, the peak only grows."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def gpu_capacity(device: torch.device) -> int:
    """Bytes of a GPU that this process may hold, with those it holds: what others leave, less something to spare."""
    free, total = torch.cuda.mem_get_info(device)
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return int(min(free + torch.cuda.memory_reserved(device), limit) * (1 - SPARE))


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes that processes of this job can still take: of the machine's, and of every limit of a cgroup above it.

    Raises:
        OSError: there is no Linux under `root` to ask.
    """
    free = [_number_after("MemAvailable:", (root / "proc/meminfo").read_text()) * 1024]
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        second = controllers == ""  # version 2 of cgroups
        if not second and "memory" not in controllers.split(","):
            continue
        groups = root / "sys/fs/cgroup" / ("" if second else "memory")
        held, most = ("memory.current", "memory.max") if second else ("memory.usage_in_bytes", "memory.limit_in_bytes")
        inner = groups / path.lstrip("/")
        for group in (inner, *inner.parents):
            with contextlib.suppress(OSError, ValueError):  # not every group has a limit; "max" is none
                cache = _number_after("inactive_file ", (group / "memory.stat").read_text())
                free.append(int((group / most).read_text()) - int((group / held).read_text()) + cache)
            if group == groups:
                break
    return max(0, min(free))


class MemoryAdvice(L.Callback):
    """Puts into an out-of-memory error what would fit, and what else can be done.

    Once the memory of the failed step is free again, the encoder is run, forward and backward, on a few rows of what
    it was given, at two sizes; the difference is what a row takes. No rank waits for another, so this also works where
    one of several has failed.

    Attributes:
        fits: lesions for each device that would fit, after an error; None if that could not be measured.
    """

    def __init__(self) -> None:
        self.fits: int | None = None
        self._rows: Tensor | None = None  # a few of what the encoder was given
        self._num_rows = 0
        self._batch_size = 0
        self._at_start = 0
        self._hook: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See how many rows the encoder is given at a time."""
        encoder = getattr(pl_module, "encoder", None)
        if isinstance(encoder, nn.Module) and pl_module.device.type == "cuda":
            self._hook = encoder.register_forward_pre_hook(self._look)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the memory of what is there in any case: weights, the optimizer's state, the batch itself."""
        if self._hook is not None:
            self._at_start = torch.cuda.memory_allocated(pl_module.device)
            self._batch_size = _num_lesions(batch)
            self._num_rows = 0

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say what would fit."""
        if not isinstance(exception, torch.OutOfMemoryError):
            return
        # What the failed step has made is held by the frames that the error went through.
        traceback.clear_frames(exception.__traceback__)
        with contextlib.suppress(Exception):  # advice must not hide the error that it is about
            self.fits = self._measure(trainer, pl_module)
        exception.args = (self._advice(trainer, pl_module, str(exception)),)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look no more."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._rows = None

    def _look(self, encoder: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0]
        self._num_rows = max(self._num_rows, len(rows))
        if self._rows is None and torch.is_grad_enabled():
            self._rows = rows[:1].detach().cpu()

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> int | None:
        if self._rows is None or not self._batch_size or not self._num_rows:
            return None
        device = pl_module.device
        pl_module.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        encoder: Any = pl_module.encoder
        with _as_in_a_trial(encoder):
            row = self._rows.to(device)
            # The first also chooses kernels, and is not counted.
            _, fewer, more = (self._peak(trainer, encoder, row.repeat(n, 1, 1, 1, 1)) for n in (1, 4, 8))
        per_row = max(more - fewer, 1) / 4
        parameters = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
        # The optimizer makes its state at its first step: two numbers a weight for Adam and its kind.
        to_come = parameters * (1 if _has_state(trainer) else 3)
        per_lesion = per_row * self._num_rows / self._batch_size
        return max(0, int((gpu_capacity(device) - self._at_start - to_come) / per_lesion))

    @staticmethod
    def _peak(trainer: L.Trainer, encoder: nn.Module, rows: Tensor) -> int:
        device = rows.device
        before = torch.cuda.memory_allocated(device) - rows.numel() * rows.element_size()
        torch.cuda.reset_peak_memory_stats(device)
        with trainer.precision_plugin.forward_context():
            features = encoder(rows)
        features.float().sum().backward()
        encoder.zero_grad(set_to_none=True)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    def _advice(self, trainer: L.Trainer, pl_module: L.LightningModule, error: str) -> str:
        lines = [f"the GPU's memory is not enough for data.batch_size={self._batch_size or '?'} on each device"]
        if self.fits is not None and 0 < self.fits < self._batch_size:
            lines.append(f"  data.batch_size={self.fits} would fit, by what the encoder takes for each lesion")
        elif self.fits is not None and self.fits >= self._batch_size:
            lines.append("  the encoder alone would fit: the loss, or another program on this GPU, takes the rest")
        elif self.fits == 0:
            lines.append("  not one lesion fits: take a smaller encoder or data.patch_size, or a larger GPU")
        if hasattr(pl_module, "chunk_size"):
            chunk: Any = pl_module.chunk_size or self._batch_size
            fits = max(1, min(self.fits or chunk // 2, chunk - 1))
            lines.append(
                f"  method.chunk_size={fits} embeds so many at a time and keeps the batch; docs/large_batches.md"
            )
        if str(trainer.precision).startswith("32"):
            lines.append("  hardware.precision=bf16-mixed takes about half of the memory for activations")
        lines.append("  a smaller data.patch_size or encoder; more devices with fewer lesions each")
        return "\n".join(lines) + f"\ntorch says: {error.splitlines()[0] if error else 'out of memory'}"


@contextmanager
def _as_in_a_trial(encoder: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which batch norm neither learns nor waits for other ranks."""
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _num_lesions(batch: Any) -> int:
    lesions = batch.get("lesion") if isinstance(batch, dict) else None
    return len(lesions) if isinstance(lesions, Tensor) else 0


def _has_state(trainer: L.Trainer) -> bool:
    return any(len(optimizer.state) for optimizer in trainer.optimizers)


def _number_after(word: str, text: str) -> int:
    return int(text.partition(word)[2].split()[0])
