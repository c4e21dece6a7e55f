"""Devices add up to one larger batch: 2 and 4 processes on 1 and 2 nodes, chunked or not."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from tiny_contrast import LOSSES, FixedViews, assert_same_gradients, make_module, make_trainer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader

PER_RANK = 3
#: (nodes, processes a node)
TOPOLOGIES = [(1, 2), (2, 1), pytest.param((2, 2), marks=pytest.mark.slow)]
#: Lesions embedded at a time: 3 in chunks of at most 2 are 2 and 1.
CHUNK_SIZES = [None, 2]


class Reductions(L.Callback):
    """The sizes of the buckets that DDP reduces. Lightning passes a hook on to it for GPUs only."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        def counting(state, bucket):  # DDP looks at annotations, and does not take them as text
            self.sizes.append(bucket.buffer().numel())
            return allreduce_hook(state, bucket)

        trainer.strategy.model.register_comm_hook(None, counting)


def one_step(loss: str, num_lesions: int, batch_size: int, folder: Path, options: Any, **trainer: Any) -> Any:
    """A step of plain SGD at rate 1: the change of each parameter is its gradient."""
    module = make_module(LOSSES[loss](gather_distributed=True), **options).double()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    runner = make_trainer(folder, precision="64-true", **trainer)
    runner.fit(module, DataLoader(FixedViews(num_lesions), batch_size=batch_size))
    gradients = {name: before[name] - parameter.detach() for name, parameter in module.named_parameters()}
    return runner.callback_metrics["train/loss"], gradients


def run_rank(num_nodes: int, devices: int, rank: int, port: int, folder: Path) -> None:
    """All cases in one process group: starting one takes seconds."""
    node, local = divmod(rank, devices)
    # What a cluster's launcher sets for Lightning.
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": str(node), "LOCAL_RANK": str(local)}
    os.environ.update(launched)
    torch.set_num_threads(1)
    num_lesions = PER_RANK * num_nodes * devices
    found: dict[Any, Any] = {}
    for loss in LOSSES:
        for chunk_size in CHUNK_SIZES:
            options, reductions = {"chunk_size": chunk_size}, Reductions()
            where = {"strategy": "ddp", "devices": devices, "num_nodes": num_nodes, "callbacks": [reductions]}
            value, gradients = one_step(loss, num_lesions, PER_RANK, folder, options, **where)
            found[loss, chunk_size] = value, gradients, reductions.sizes
    found["rank"] = dist.get_rank(), dist.get_world_size()
    torch.save(found, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module", params=TOPOLOGIES, ids=lambda t: f"{t[0]} nodes of {t[1]}")
def ranks(tmp_path_factory: pytest.TempPathFactory, request: Any) -> list[Any]:
    num_nodes, devices = request.param
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not forked from here, where threads of other tests may hold a lock; the server has done the imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fmcib_ssl.run"])
    arguments = [(num_nodes, devices, rank, port, folder) for rank in range(num_nodes * devices)]
    processes = [context.Process(target=run_rank, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
        assert process.exitcode == 0
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(len(processes))]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The step of one process with the whole batch at once, each asked for once."""
    found: dict[Any, Any] = {}

    def step(loss: str, num_lesions: int) -> Any:
        if (loss, num_lesions) not in found:
            folder = tmp_path_factory.mktemp("one")
            found[loss, num_lesions] = one_step(loss, num_lesions, num_lesions, folder, {})
        return found[loss, num_lesions]

    return step


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("loss", LOSSES)
def test_processes_equal_one_with_the_whole_batch(
    ranks: list[Any], one_process: Any, loss: str, chunk_size: int | None
) -> None:
    expected_loss, expected = one_process(loss, PER_RANK * len(ranks))
    assert [found["rank"] for found in ranks] == [(rank, len(ranks)) for rank in range(len(ranks))]
    for found in ranks:
        value, gradients, reductions = found[loss, chunk_size]
        torch.testing.assert_close(value, expected_loss, rtol=1e-6, atol=0)  # metrics are float32
        assert_same_gradients(gradients, expected)
        assert reductions == [sum(gradient.numel() for gradient in expected.values())]  # one, of everything
