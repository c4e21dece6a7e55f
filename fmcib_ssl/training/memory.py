"""What to do when a GPU's memory is not enough."""

from __future__ import annotations

import lightning as L
import torch


class MemoryAdvice(L.Callback):
    """Puts into an out-of-memory error what can be done about it."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say it, with the first line of what torch says."""
        if isinstance(exception, torch.OutOfMemoryError):
            reason = str(exception).partition("\n")[0] or "out of memory"
            exception.args = (
                "the GPU's memory is not enough for this run. What helps:\n"
                "  a smaller data.batch_size\n"
                "  method.chunk_size=N, which embeds N lesions at a time and keeps the batch (docs/large_batches.md)\n"
                "  hardware.precision=bf16-mixed or hardware.gradient_checkpointing=true\n"
                "  a smaller data.patch_size or encoder; more devices with fewer lesions each\n"
                f"torch says: {reason}",
            )
