"""Decode with each request's cache spread over several GPUs, token by token in turn.

python demos/examples/context_parallel.py [number of ranks]

Starts its ranks itself: with NCCL on as many GPUs, else with gloo and the interpreter.
"""

from __future__ import annotations

import math
import sys
import tempfile

import mla_decode
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mla_decode.distributed import context_parallel_decode, visible_interleaved

HEADS, NEW_TOKENS, BLOCK_SIZE = 16, 2, 64
LENGTHS = [130, 3, 451]  # of whole requests, new tokens included
SOFTMAX_SCALE = 192**-0.5


def main() -> int:
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    on_gpus = torch.cuda.device_count() >= ranks
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (ranks, on_gpus, f"file://{folder}/ranks"), nprocs=ranks)
    print("all ranks passed")
    return 0


def run_rank(rank: int, ranks: int, on_gpus: bool, meeting_point: str) -> None:
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, init_method=meeting_point, rank=rank, world_size=ranks)

    # Every rank makes the same requests, and keeps every ranks-th key of each in its cache.
    torch.manual_seed(0)
    keys = [torch.randn(length, 576).bfloat16() / 8 for length in LENGTHS]
    q = torch.randn(len(LENGTHS), NEW_TOKENS, HEADS, 576).bfloat16() / 8
    own = [request[rank::ranks] for request in keys]
    kv_cache, block_table = paged(own)

    out, lse = context_parallel_decode(
        q.to(device),
        kv_cache.to(device),
        block_table.to(device),
        [len(request) for request in own],
        visible=visible_interleaved(LENGTHS, NEW_TOKENS, rank, ranks),
        softmax_scale=SOFTMAX_SCALE,
    )
    mla_decode.synchronize(device)

    worst = max(
        float((out[i].cpu().double() - want).norm() / want.norm())
        for i, want in enumerate(map(attention, q, keys))
    )
    held = [len(request) for request in own]
    print(f"rank {rank} on {device}: keys {held} of {LENGTHS}, relative error {worst:.1e}")
    # Rounded to bf16 are the weights, each rank's output and the merged one.
    if not (worst < 4e-3 and bool(lse.isfinite().all())):
        raise SystemExit(f"rank {rank}: FAILED")
    dist.destroy_process_group()


def paged(requests: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache and block table that hold ``requests``, one behind the other."""
    blocks = [math.ceil(len(request) / BLOCK_SIZE) for request in requests]
    kv_cache = torch.zeros(sum(blocks), BLOCK_SIZE, 576, dtype=torch.bfloat16)
    block_table = torch.zeros(len(requests), max(blocks), dtype=torch.int32)
    first = 0
    for row, (request, count) in enumerate(zip(requests, blocks, strict=True)):
        kv_cache[first : first + count].view(-1, 576)[: len(request)] = request
        block_table[row, :count] = torch.arange(first, first + count)
        first += count
    return kv_cache, block_table


def attention(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Causal attention of one request in float64, over all its keys."""
    scores = torch.einsum("shd,kd->shk", q.double(), keys.double()) * SOFTMAX_SCALE
    last = len(keys) - len(q) + torch.arange(len(q))
    scores.masked_fill_(torch.arange(len(keys)) > last[:, None, None], -math.inf)
    return scores.softmax(-1) @ keys[:, :512].double()


if __name__ == "__main__":
    sys.exit(main())
