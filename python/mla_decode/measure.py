"""Times of decode calls on a GPU, by replaying a CUDA graph."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from .calls import TensorOrPair
from .decoding import AnyPlan, decode
from .native import synchronize
from .planning import Plan
from .reference import Case
from .words import TIMING_WORDS

REPLAYS = 20
_L2_FACTOR = 4  # the caches that a graph rotates over hold this many times the L2
_MAX_COPIES = 8


def replay_us(
    calls: list[Callable[[], object]],
    replays: int = REPLAYS,
    captured: Callable[[], object] = lambda: None,
) -> float:
    """Median microseconds per call of a CUDA graph that holds ``calls`` in order.

    ``captured`` is called before the first replay.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # allocations and copies happen outside the capture
            call()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    captured()
    times = []
    for number in range(replays + 3):
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(float(start.elapsed_time(end)) * 1e3 / len(calls))
    synchronize()
    return statistics.median(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def decode_case(
    case: Case,
    plan: AnyPlan | None = None,
    *,
    kv_cache: TensorOrPair | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mla_decode.decode` of a case, or of ``kv_cache`` in the place of the case's cache."""
    csr = case.kv_indptr is not None
    return decode(
        case.q,
        case.kv_cache if kv_cache is None else kv_cache,
        None if csr else case.block_table,
        case.seq_lens,
        plan,
        case.softmax_scale,
        **{
            "causal": case.causal,
            "cu_seqlens_q": case.cu_seqlens_q,
            "kv_indptr": case.kv_indptr,
            "kv_indices": case.block_table if csr else None,
            "attn_sink": case.attn_sink,
            "lse_base": case.lse_base,
            "lse_empty": case.lse_empty,
            **options,
        },
    )


def decode_us(case: Case, plan: Plan, replays: int = REPLAYS) -> float:
    """Microseconds per decode call, its cache read from memory and not from L2."""
    return decode_us_and_outputs(case, plan, replays)[0]


def decode_us_and_outputs(
    case: Case, plan: Plan, replays: int = REPLAYS
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """`decode_us`, and what O and LSE the replays left: NaN where they wrote nothing."""
    properties = torch.cuda.get_device_properties(case.q.device)
    kv = case.kv_cache if isinstance(case.kv_cache, torch.Tensor) else case.kv_cache[0]
    l2_bytes = int(properties.L2_cache_size)
    copies = _L2_FACTOR * l2_bytes // (kv.numel() * kv.element_size()) + 1
    copies = min(max(copies, 2), _MAX_COPIES)
    out, lse = case.poisoned_outputs()

    def call_on(cache: TensorOrPair) -> Callable[[], object]:
        return lambda: decode_case(case, plan, kv_cache=cache, out=out, lse=lse)

    caches = [case.kv_cache] + [_copy(case.kv_cache) for _ in range(copies - 1)]

    def poison() -> None:
        out.fill_(math.nan)
        lse.fill_(math.nan)

    return replay_us([call_on(cache) for cache in caches], replays, poison), out, lse


def timing_records(case: Case, plan: Plan) -> torch.Tensor:
    """Timing records ``[n, 8]`` of one warm launch (of the interpreter on the CPU)."""
    timings = torch.zeros(
        plan.num_instructions, TIMING_WORDS, dtype=torch.int32, device=case.q.device
    )
    for _ in range(3 if case.q.is_cuda else 1):
        decode_case(case, plan, timings=timings)
    synchronize(case.q.device)
    return timings


def _copy(cache: TensorOrPair) -> TensorOrPair:
    return (
        cache.clone() if isinstance(cache, torch.Tensor) else (cache[0].clone(), cache[1].clone())
    )
