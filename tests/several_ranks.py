"""What tests of several ranks share: starting them, and caches spread over them."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

BLOCK_SIZE = 64
WIDTH, LATENT = 576, 512
SCALE = 192**-0.5


def run_ranks(
    work: Callable[..., None],
    world_size: int,
    folder: Path,
    *arguments: Any,
    backend: str = "gloo",
    timeout_s: float = 120,
) -> None:
    """Run ``work(rank, folder, *arguments)`` in a process group of new processes.

    Raises what a rank raised, and TimeoutError after ``timeout_s``; no process is left.
    """
    start = (work, world_size, str(folder), backend, timeout_s, *arguments)
    context = mp.start_processes(
        _rank_main, start, nprocs=world_size, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + timeout_s
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{work.__name__}: ranks still run after {timeout_s} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _rank_main(
    rank: int,
    work: Callable[..., None],
    world_size: int,
    folder: str,
    backend: str,
    timeout_s: float,
    *arguments: Any,
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s / 2),
    )
    try:
        work(rank, Path(folder), *arguments)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Batch:
    """Requests with all their keys; the same on every rank."""

    q: torch.Tensor
    """``[T, H, 576]``."""
    keys: list[torch.Tensor]
    """``[length, 576]`` of each request."""
    tokens: list[int]
    """New tokens of each request."""

    @property
    def lengths(self) -> list[int]:
        return [len(keys) for keys in self.keys]

    @property
    def cu_seqlens_q(self) -> torch.Tensor:
        return torch.tensor([0, *self.tokens]).cumsum(0).int()

    def attention(self, sink: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Float64 ``[T, H, 512]`` and natural LSE ``[T, H]``; 0 and -inf where no key is seen."""
        out = torch.zeros(*self.q.shape[:2], LATENT, dtype=torch.float64)
        lse = torch.full(self.q.shape[:2], -math.inf, dtype=torch.float64)
        row = 0
        for keys, tokens in zip(self.keys, self.tokens, strict=True):
            for token in range(tokens):
                seen = keys[: max(0, len(keys) - tokens + token + 1)].double()
                if len(seen):
                    scores = self.q[row].double() @ seen.T * SCALE
                    out[row] = scores.softmax(-1) @ seen[:, :LATENT]
                    lse[row] = scores.logsumexp(-1)
                row += 1
        if sink is not None:
            out *= torch.sigmoid(lse - sink.double()).unsqueeze(-1)
        return out, lse


def make_batch(
    lengths: list[int],
    tokens: list[int],
    num_heads: int,
    *,
    padding: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Batch:
    """A random batch on the CPU; ``padding`` rows of q belong to no request."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        random = torch.randn(*shape, generator=generator)
        return random.div_(10).clamp_(-1, 1).to(dtype)

    q = values(sum(tokens) + padding, num_heads, WIDTH)
    return Batch(q, [values(length, WIDTH) for length in lengths], tokens)


def paged(
    keys: list[torch.Tensor], *, block_size: int = BLOCK_SIZE, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cache ``[blocks, block_size, 576]`` and table ``[B, max_blocks]`` that hold ``keys``.

    What no request owns is NaN in the cache, and a wild block id in the table.
    """
    used = [-(-len(own) // block_size) for own in keys]
    cache = torch.full((sum(used) + 2, block_size, WIDTH), math.nan, dtype=keys[0].dtype)
    table = torch.full((len(keys), max(used) + 1), 2**31 - 1, dtype=torch.int32)
    order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(seed))
    for request, own in enumerate(keys):
        ids, order = order[: used[request]], order[used[request] :]
        table[request, : len(ids)] = ids.int()
        for i, block in enumerate(ids):
            part = own[i * block_size : (i + 1) * block_size]
            cache[block, : len(part)] = part
    return cache, table
