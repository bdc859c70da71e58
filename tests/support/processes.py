"""Training processes without Ray: a gloo group of forked workers."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Workers start with what takes most of their time to import.
mp.get_context("forkserver").set_forkserver_preload(
    ["gfl.train.engine", "gfl.evaluation.evaluator"]
)


def run_workers(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `work(rank, *arguments)` returned on each of `count` workers in one group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as folder:
        given = (count, port, folder, work, arguments)
        mp.start_processes(_work, given, nprocs=count, start_method="forkserver")
        results = [Path(folder) / f"{rank}.pt" for rank in range(count)]
        return [torch.load(path, weights_only=False) for path in results]


def _work(rank: int, count: int, port: int, folder: str, work: Any, arguments: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=count)
    try:
        torch.save(work(rank, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
