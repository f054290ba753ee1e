"""Timelines as Chrome trace JSON, which Perfetto (https://ui.perfetto.dev) opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .timeline import Slice, Timeline
from .words import Partial, Reduction

_MIN_US = 0.001  # of a slice: a flow must start and end inside one


def write_trace(timeline: Timeline, path: str | Path) -> Path:
    """Write one track per SM, a named slice per instruction, arrows to the readers of slots.

    An instruction's slice starts when its loads start and its predecessor on the SM is done,
    so that slices of a track do not overlap; its arguments hold the raw times. Measured
    slices have the phases load, compute, store inside.
    """
    events: list[dict[str, Any]] = [
        _meta("process_name", 0, {"name": f"{timeline.source}: {timeline.shape}"}),
    ]
    for worker in range(timeline.num_workers):
        events.append(_meta("thread_name", worker, {"name": f"SM {worker}"}))
        events.append(_meta("thread_sort_index", worker, {"sort_index": worker}))
    shown: dict[int, tuple[float, float]] = {}
    for row in timeline.rows():
        reached = 0.0
        for s in sorted(row, key=lambda s: (s.end_us, s.index)):
            begin = max(s.start_us, reached)
            reached = max(s.end_us, begin + _MIN_US)
            shown[s.index] = (begin, reached)
            args = _arguments(s, timeline.num_kv_heads)
            events.append(_complete(s.label, s, begin, reached, args))
            events.extend(_phases(s, begin, reached))
    for number, (source, target) in enumerate(timeline.flows):
        events.extend(_arrow(timeline, shown, number, source, target))
    document = {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {
            "source": timeline.source,
            "device": timeline.device,
            "shape": timeline.shape,
            "makespan_us": round(timeline.makespan_us, 3),
            "floor_us": round(timeline.floor_us, 3),
        },
    }
    target_path = Path(path)
    target_path.parent.mkdir(parents=True, exist_ok=True)
    target_path.write_text(json.dumps(document), encoding="utf-8")
    return target_path


def _meta(name: str, worker: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": 0, "tid": worker, "args": args}


def _complete(
    name: str, s: Slice, begin: float, end: float, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": s.kind,
        "pid": 0,
        "tid": s.worker,
        "ts": round(begin, 4),
        "dur": round(end - begin, 4),
        "args": args,
    }


def _phases(s: Slice, begin: float, end: float) -> list[dict[str, Any]]:
    """Phases one after the other: loads reach into the computation that they feed."""
    events, reached = [], begin
    for number, phase in enumerate(s.phases):
        last = number + 1 == len(s.phases)
        next_start = end if last else s.phases[number + 1].start_us
        stop = min(max(next_start, reached), end)
        if stop > reached:
            events.append(_complete(phase.name, s, reached, stop, {}))
        reached = stop
    return events


def _arrow(
    timeline: Timeline,
    shown: dict[int, tuple[float, float]],
    number: int,
    source: int,
    target: int,
) -> list[dict[str, Any]]:
    begin, end = shown[source]
    leaves = end - min(_MIN_US / 2, (end - begin) / 2)
    common = {"name": "partial result", "cat": "flow", "id": number, "pid": 0}
    return [
        {**common, "ph": "s", "tid": timeline.slices[source].worker, "ts": round(leaves, 4)},
        {
            **common,
            "ph": "f",
            "bp": "e",
            "tid": timeline.slices[target].worker,
            "ts": round(max(shown[target][0], leaves), 4),
        },
    ]


def _arguments(s: Slice, num_kv_heads: int) -> dict[str, Any]:
    args: dict[str, Any] = {"queue position": s.index, "uid": s.instruction.uid}
    if isinstance(s.instruction, Partial):
        args["request"] = s.request
        if num_kv_heads > 1:
            args["KV head"] = s.kv_head
        args["keys"] = f"[{s.instruction.start}, {s.instruction.end})"
        if s.instruction.num_mates:
            args["mate"] = f"{s.instruction.mate} of {s.instruction.num_mates}"
        if s.instruction.adopted is not None:
            args["adopts"] = f"slot {s.instruction.adopted}"
    elif isinstance(s.instruction, Reduction):
        args["inputs"] = _describe_inputs(s.instruction.inputs)
    if s.fetched_us is not None:
        args["fetched_us"] = round(s.fetched_us, 3)
    for phase in s.phases:
        args[f"{phase.name}_us"] = f"{phase.start_us:.3f} to {phase.end_us:.3f}"
    return args


def _describe_inputs(inputs: tuple[int, ...] | range) -> list[int] | str:
    """Scratch slots; of a run, which may have thousands, the ends and the step."""
    if not isinstance(inputs, range):
        return list(inputs)
    step = f", every {inputs.step}" if inputs.step > 1 and len(inputs) > 1 else ""
    return f"{len(inputs)} slots, {inputs[0]} to {inputs[-1]}{step}"
