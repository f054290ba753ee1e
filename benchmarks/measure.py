"""Times implementations of one shape on the GPU, beside each other and with their outputs checked.

Each implementation is captured into a CUDA graph of eight calls or so that go round the copies of
the inputs, so that no call finds its KV in L2; before each replay the L2 is filled with other data,
by reads (writes would have to drain during the measurement). Replays of the implementations
alternate, so that clocks and temperature are the same for all. Outputs are poisoned before each
timed replay and compared with the reference after it, both outside of the time: a launch that did
nothing is an error, not a record.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.case import (
    CACHE_FACTOR,
    Case,
    WorstErrors,
    calls_per_copy,
    make_case,
    number_of_copies,
)
from benchmarks.implementations import IMPLEMENTATIONS, STEPS, NotOfferedError, Prepared
from benchmarks.shapes import ASSUMED, Floor, Shape

REPLAYS = 20
WARMUP_REPLAYS = 3
# Each reads 200 MB on an H200, some 50 us, in which a busy host may not get a replay enqueued: what
# the GPU then waits for it would be counted, up to 2 us a call.
FLUSHES = 4
MAX_REL_ERR = 3e-3  # of O against float64, relative L2
# The same of the rows of one request, which long ones need: their O is small, and a wrong one hides
# behind short ones. One wrong row of 128 heads costs 0.09; rounding costs 3e-3.
MAX_REQUEST_REL_ERR = 1e-2


@dataclass
class Row:
    """One line of the benchmark; ``error`` says why there is no number, or why not to trust it.

    With neither a number nor an error, the implementation has no operation for the shape.
    """

    shape: Shape
    impl: str
    us: float = math.nan
    rel_err: float = math.nan
    error: str = ""
    replays_us: list[float] = field(default_factory=list)
    floor: Floor = ASSUMED

    @property
    def has_figure(self) -> bool:
        """Whether it has one to trust."""
        return math.isfinite(self.us) and not self.error

    @property
    def floor_us(self) -> float:
        return self.floor.us(self.shape)

    @property
    def gbps(self) -> float:
        return self.shape.bytes / self.us / 1e3

    @property
    def tflops(self) -> float:
        return self.shape.flop / self.us / 1e6

    def as_json(self) -> dict[str, str | float]:
        return {
            "shape": self.shape.name,
            "impl": self.impl,
            "us": round(self.us, 3),
            "gbps": round(self.gbps, 1),
            "tflops": round(self.tflops, 2),
            "floor_us": round(self.floor_us, 4),
            "rel_err": self.rel_err,
        }


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def other_data(device: torch.device) -> torch.Tensor:
    """More of it than fits into the GPU's L2, for `replay_us` to read."""
    l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.ones(CACHE_FACTOR * l2_bytes // 4, dtype=torch.float32, device=device)


def replay_us(graph: torch.cuda.CUDAGraph, flush: torch.Tensor) -> float:
    """Replay once, on a GPU that is busy with ``flush`` until then, and return microseconds."""
    for _ in range(FLUSHES):
        flush.sum()  # directly before the replay: it drives from L2 what was written last
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def median_replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Return the median microseconds of so many replays, after a few that warm up."""
    flush = other_data(torch.device("cuda", torch.cuda.current_device()))
    times = [replay_us(graph, flush) for _ in range(WARMUP_REPLAYS + replays)]
    return statistics.median(times[WARMUP_REPLAYS:])


class Capture:
    """One implementation's calls on copies, in a graph that replays them in order."""

    def __init__(self, case: Case, prepared: Prepared, order: list[int]) -> None:
        self.prepared = prepared  # keeps plans and workspaces alive
        call = prepared.call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lazy initialisation happens outside the capture
            prepared.plan()
            for i in range(case.copies):
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        self.prepared.synchronize()
        self.case = case
        self.order = order
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            prepared.plan()
            self.outputs = [call(i) for i in self.order]
        self.times_us: list[float] = []
        self.errors = WorstErrors(case)

    def time(self, flush: torch.Tensor) -> None:
        """Replay once more, the KV not in L2 and the outputs poisoned before; check them after."""
        for out in self.outputs:
            out.fill_(math.nan)
        self.times_us.append(replay_us(self.graph, flush))
        for i, out in zip(self.order, self.outputs, strict=True):
            self.errors.add(i, out)

    def problem(self) -> str:
        """Why not to trust the times; empty if nothing was wrong."""
        try:
            self.prepared.synchronize()
        except Exception as error:
            return describe(error)
        return wrong_output(self.case.shape, self.errors)


def wrong_output(shape: Shape, errors: WorstErrors) -> str:
    """Say how far outputs were from the reference; empty if they were as near as expected."""
    whole, (request, worst) = errors.whole, errors.worst_request
    if whole <= MAX_REL_ERR and worst <= MAX_REQUEST_REL_ERR:
        return ""
    return (
        f"wrong output: relative error {whole:.2e}, expected at most {MAX_REL_ERR:.0e}; of request "
        f"{request} ({shape.seq_lens[request]} keys) {worst:.2e}, expected at most "
        f"{MAX_REQUEST_REL_ERR:.0e}"
    )


def case_of(shape: Shape, device: torch.device, seed: int) -> Case:
    """Make as many copies of the shape's inputs as leave L2 and fit into the GPU's memory."""
    properties = torch.cuda.get_device_properties(device)
    room = properties.total_memory // 3
    copies = number_of_copies(shape.kv_bytes, properties.L2_cache_size, room)
    return make_case(shape, device, copies=copies, seed=seed)


def measure(
    shape: Shape,
    impls: list[str],
    *,
    replays: int = REPLAYS,
    seed: int = 0,
    layers: int = 0,
    floor: Floor = ASSUMED,
    prepare: Mapping[str, Callable[[Case], Prepared]] | None = None,
) -> list[Row]:
    """Time ``impls`` on one shape; one row each, in that order.

    Microseconds are of one call, planned before; with ``layers`` of a decode step of so many calls,
    planned on the GPU. The rows are told the ``floor`` of the GPU. ``prepare`` makes each ready;
    without it those of `benchmarks.implementations` do.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
    try:
        case = case_of(shape, device, seed)
    except Exception as error:  # too large, mostly: one shape less, the others go on
        return [Row(shape, impl, error=describe(error), floor=floor) for impl in impls]
    order = list(range(case.copies)) * calls_per_copy(case.copies, shape.kv_bytes, l2_bytes)
    if layers:
        order = [i % case.copies for i in range(layers)]
    if prepare is None:
        prepare = STEPS if layers else IMPLEMENTATIONS
    rows = {impl: Row(shape, impl, floor=floor) for impl in impls}
    captures: dict[str, Capture] = {}
    for impl in impls:
        if impl not in prepare:
            continue
        try:
            captures[impl] = Capture(case, prepare[impl](case), order)
        except NotOfferedError:
            continue
        except Exception as error:  # one implementation less, the others go on
            rows[impl].error = describe(error)
    flush = other_data(device)
    for _ in range(WARMUP_REPLAYS):
        for capture in captures.values():
            replay_us(capture.graph, flush)
    for _ in range(replays):
        for capture in captures.values():
            capture.time(flush)
    for impl, capture in captures.items():
        row = rows[impl]
        row.replays_us = [us if layers else us / len(order) for us in capture.times_us]
        row.us = statistics.median(row.replays_us)
        row.rel_err = capture.errors.whole
        row.error = capture.problem()
    return list(rows.values())
