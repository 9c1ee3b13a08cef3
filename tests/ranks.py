"""Processes that run checks as ranks of a group. They are started once, since each has to import torch."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist

Check = Callable[[], None]

if not dist.is_available():
    pytest.skip("torch is built without distributed", allow_module_level=True)

_processes: list[multiprocessing.process.BaseProcess] = []
_pipes: list[Connection] = []


def run_ranks(world: int, *checks: Check, fresh: bool = False) -> None:
    """Runs the checks in turn on every rank of a default group of that size, and raises the first error.

    fresh: in processes that have imported and registered nothing yet.
    """
    if fresh:
        _stop()
    while len(_processes) < world:
        _start()
    with tempfile.TemporaryDirectory() as folder:
        waiting = dict(zip(_pipes[:world], range(world), strict=True))
        for pipe, rank in waiting.items():
            pipe.send((rank, world, folder, checks))
        while waiting:
            ready: list[Any] = wait(list(waiting))
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    error = pipe.recv()
                except EOFError:
                    error = "its process ended"
                if error:
                    _stop()
                    raise AssertionError(f"rank {rank} of {world}: {error}")


def _start() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    _processes.append(process)
    _pipes.append(ours)


@atexit.register
def _stop() -> None:
    for process in _processes:
        process.kill()
        process.join()
    _processes.clear()
    _pipes.clear()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            rank, world, folder, checks = pipe.recv()
        except EOFError:
            os._exit(0)  # at interpreter shutdown threads of Gloo may abort (pytorch/pytorch#190489)
        try:
            _run(rank, world, folder, checks)
        except BaseException:
            pipe.send(traceback.format_exc())
            os._exit(1)
        pipe.send(None)


def _run(rank: int, world: int, folder: str, checks: tuple[Check, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    if "torch.distributed.tensor" in sys.modules:  # cached rules hold meshes of groups that ended
        importlib.import_module("torch.distributed.tensor.debug")._clear_sharding_prop_cache()
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    for check in checks:
        torch.manual_seed(0)  # the same on all ranks
        check()
        dist.barrier()
    dist.destroy_process_group()
