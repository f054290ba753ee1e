"""This GPU's own floor: what a kernel costs that brings bytes into shared memory and stops.

`make bench ARGS=--floor`. The floor that the tables use is that of an H200
(`mla_decode.cost.floor_us`), 1.6 us and 4.6 TB/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mla_decode import cost

from benchmarks.case import CACHE_FACTOR
from benchmarks.measure import median_replay_us

MEGABYTES = (9.4, 42.5, 75.5, 151, 302, 608)
ALIGNMENT = 1 << 16  # bytes; streams that begin within a cache line are a tenth slower
MOST_CALLS = 64  # in a graph
WARM_UP_REPLAYS = 500  # of the largest, a third of a second


@dataclass(frozen=True)
class Floor:
    """Microseconds of a launch, and bytes per microsecond after it."""

    launch_us: float
    bytes_per_us: float

    def us(self, num_bytes: float) -> float:
        """Microseconds to stream so many bytes."""
        return self.launch_us + num_bytes / self.bytes_per_us


def fit(num_bytes: Sequence[float], us: Sequence[float]) -> Floor:
    """The line through the measurements; each counts by its relative error."""
    x, y = np.asarray(num_bytes), np.asarray(us)
    slope, start = np.polyfit(x, y, 1, w=1 / y)
    return Floor(float(start), float(1 / slope))


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


def measure(replays: int) -> tuple[list[int], list[float], Floor]:
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


def run(replays: int) -> int:
    """Print the streams and the line through them; 2 where the kernel was not built."""
    try:
        sizes, us, floor = measure(replays)
    except ImportError as error:
        print(f"bench: the streaming kernel was not built ({error}): run make where nvcc is")
        return 2
    print(f"streaming into shared memory on {torch.cuda.get_device_name()}, nothing computed")
    print(f"{'MB':>8} {'us':>8} {'TB/s':>6} {'the line, us':>13} {'the tables, us':>15}")
    for size, taken in zip(sizes, us, strict=True):
        assumed = cost.FLOOR_LAUNCH_US + size / cost.FLOOR_BYTES_PER_US
        print(
            f"{size / 1e6:8.1f} {taken:8.2f} {size / taken / 1e6:6.2f} {floor.us(size):13.2f} "
            f"{assumed:15.2f}"
        )
    print(
        f"floor of this GPU: {floor.launch_us:.2f} us + bytes / {floor.bytes_per_us / 1e6:.2f} TB/s"
    )
    return 0
