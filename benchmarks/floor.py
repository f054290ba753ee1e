"""This GPU's own floor: what a kernel costs that brings bytes into shared memory and stops.

The benchmark measures it before its table and counts with it; `make bench ARGS=--floor` prints the
streams themselves. Without the kernel (`benchmarks/stream.cu`) an H200's floor is assumed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.case import CACHE_FACTOR, MAX_COPIES
from benchmarks.measure import REPLAYS, median_replay_us
from benchmarks.shapes import ASSUMED, Floor

MEGABYTES = (9.4, 42.5, 75.5, 151, 302, 608)
ALIGNMENT = 1 << 16  # bytes; streams that begin within a cache line are a tenth slower
MOST_CALLS = MAX_COPIES  # in a graph, as when calls are timed
WARM_UP_REPLAYS = 500  # of the largest, a third of a second


def missing() -> str:
    """Why the streaming kernel cannot run here; empty if it can."""
    try:
        from benchmarks import _stream
    except ImportError as error:
        return f"the streaming kernel was not built ({error}): run make where nvcc is"
    why = _stream.available(torch.cuda.current_device())
    return f"the streaming kernel cannot run here: {why}" if why else ""


def fit(num_bytes: Sequence[float], us: Sequence[float]) -> Floor:
    """The line through the measurements; each counts by its relative error."""
    x, y = np.asarray(num_bytes), np.asarray(us)
    slope, start = np.polyfit(x, y, 1, w=1 / y)
    return Floor(float(start), float(1 / slope), measured=True)


def stream_us(num_bytes: int, buffer: torch.Tensor, replays: int) -> float:
    """Median microseconds of one launch in a replayed graph that goes round ``buffer``."""
    from benchmarks import _stream

    device = torch.cuda.current_device()
    places = buffer.numel() // num_bytes
    calls = min(MOST_CALLS, max(places, 4))

    def call(i: int) -> None:
        _stream.stream(
            buffer.data_ptr() + i % places * num_bytes,
            num_bytes,
            device,
            torch.cuda.current_stream().cuda_stream,
        )

    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return median_replay_us(graph, replays) / calls


def measure(replays: int = REPLAYS) -> tuple[list[int], list[float], Floor]:
    """Bytes, microseconds, and the line through them, of the current GPU."""
    l2_bytes: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sizes = [round(megabytes * 1e6) // ALIGNMENT * ALIGNMENT for megabytes in MEGABYTES]
    # Larger than L2 by the same factor as the benchmark's caches, and twice the largest stream.
    buffer = torch.empty(
        max(2 * max(sizes), CACHE_FACTOR * l2_bytes), dtype=torch.uint8, device="cuda"
    )
    buffer.random_()
    stream_us(max(sizes), buffer, WARM_UP_REPLAYS)  # clocks rise
    us = [stream_us(size, buffer, replays) for size in sizes]
    return sizes, us, fit(sizes, us)


def of_this_gpu() -> Floor:
    """The floor of the current GPU, in a second or two; that of an H200, and loudly, if need be."""
    if why := missing():
        print(f"** {why}\n** x floor counts with a floor that is ASSUMED, not measured", flush=True)
        return ASSUMED
    _, _, measured = measure()
    torch.cuda.empty_cache()  # the streams' buffer
    return measured


def run(replays: int) -> int:
    """Print the streams and the line through them; 2 where the kernel cannot run."""
    if why := missing():
        print(f"bench: {why}", file=sys.stderr)
        return 2
    sizes, us, floor = measure(replays)
    print(f"streaming into shared memory on {torch.cuda.get_device_name()}, nothing computed")
    print(f"{'MB':>8} {'us':>8} {'TB/s':>6} {'the line, us':>13} {'assumed, us':>12}")
    for size, taken in zip(sizes, us, strict=True):
        print(
            f"{size / 1e6:8.1f} {taken:8.2f} {size / taken / 1e6:6.2f} "
            f"{floor.stream_us(size):13.2f} {ASSUMED.stream_us(size):12.2f}"
        )
    print(f"floor: {floor}")
    return 0
