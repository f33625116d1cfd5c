"""Two processes on gloo that run a test's scenario together, and stay for the next."""

from __future__ import annotations

import faulthandler
import hashlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WORLD = 2
#: Seconds that a scenario may take: starting the processes on a busy machine takes most of it.
PATIENCE_S = 150.0


class Ranks:
    """The processes; :meth:`run` calls a function in all of them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._times, self._broken = folder, 0, False
        self._start()

    def _start(self) -> None:
        folder = self._folder / str(self._times)
        folder.mkdir()
        self._times += 1
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(WORLD)]
        self._pipes: list[Connection] = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(rank, str(folder), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()

    def run(self, scenario: Callable[..., Any], *args: Any) -> list[Any]:
        """``scenario(rank, *args)`` in every process; what each returns, in the order of ranks."""
        if self._broken:  # one rank waits for the other since then
            self.close()
            self._start()
        self._broken = True
        for pipe in self._pipes:
            pipe.send((scenario, args))
        results: dict[int, Any] = {}
        # Whoever has something to say: when one rank fails, the other one waits for it in vain.
        while len(results) < WORLD:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            answered = wait(waiting, PATIENCE_S)
            assert answered, f"only ranks {sorted(results)} answer"
            for pipe in answered:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                good, results[rank] = self._pipes[rank].recv()
                assert good, f"rank {rank}:\n{results[rank]}"
        self._broken = False
        return [results[rank] for rank in range(WORLD)]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(0 if self._broken else 5)
            process.kill()


def _serve(rank: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["ESPER_CACHE_DIR"] = f"{folder}/cache-{rank}"
    os.environ["ESPER_REGISTRY"] = f"{folder}/registry"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    while True:
        try:
            scenario, args = pipe.recv()
        except EOFError:
            break
        try:
            torch.manual_seed(0)
            faulthandler.dump_traceback_later(PATIENCE_S - 10)  # tells where a rank hangs
            pipe.send((True, scenario(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def digest(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Of every tensor's bits; those that FSDP2 has sharded are put together first, by all ranks."""
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name] = hashlib.sha256(whole.detach().contiguous().view(torch.uint8).numpy()).hexdigest()
    return found
