"""Timelines: predicted and measured, as a picture and as a Perfetto trace."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import mla_decode
import numpy as np
import pytest
import torch
from mla_decode import timeline
from mla_decode.errors import DtypeError, QueueError, ShapeError
from mla_decode.measure import timing_records
from mla_decode.picture import write_png
from mla_decode.reference import make_case
from mla_decode.timeline import Timeline
from mla_decode.trace_file import write_trace
from mla_decode.words import Fill, Partial, Reduction

LENGTHS = [4641, 9000, 1730]


@pytest.fixture(scope="module")
def plan() -> mla_decode.Plan:
    return mla_decode.plan(LENGTHS, 16, 2, num_workers=24)


@pytest.fixture(scope="module")
def predicted(plan: mla_decode.Plan) -> Timeline:
    return timeline.predicted(plan)


def records(plan: mla_decode.Plan, start_ns: int = 2**32 - 4000) -> torch.Tensor:
    """Records as the kernel would write them, following the prediction; the clock wraps."""
    begin, end = (1000 * plan.start_us).astype(np.int64), (1000 * plan.end_us).astype(np.int64)
    load, compute = begin + 50, begin + 300
    words = [begin, load, end - 400, compute, end - 200, end - 200, end]
    table = np.stack(
        [plan.worker.astype(np.int64) + 1, *((w + start_ns) % 2**32 for w in words)], 1
    )
    return torch.from_numpy(table.astype(np.uint32).view(np.int32))


# Predicted


def test_predicted_timeline_is_the_plans(plan: mla_decode.Plan, predicted: Timeline) -> None:
    assert len(predicted.slices) == plan.num_instructions
    assert predicted.makespan_us == pytest.approx(plan.predicted_us)
    assert predicted.floor_us == plan.floor_us
    assert [s.worker for s in predicted.slices] == plan.worker.tolist()
    assert predicted.num_workers == 24


def test_flows_lead_from_writers_to_their_readers(predicted: Timeline) -> None:
    assert predicted.flows
    assert len(predicted.flows) == sum(len(s.instruction.inputs) for s in predicted.slices)
    for source, target in predicted.flows:
        written, read = predicted.slices[source], predicted.slices[target]
        assert isinstance(written.instruction, Partial | Reduction)
        assert written.instruction.slot in read.instruction.inputs
        assert written.end_us <= read.end_us


def test_waiting_for_inputs_counts_as_idle(predicted: Timeline) -> None:
    waits = [s for s in predicted.slices if s.ready_us > s.start_us]
    assert waits, "this plan has reductions that wait"
    last = max(predicted.flows, key=lambda f: predicted.slices[f[0]].end_us)
    assert predicted.slices[last[1]].ready_us == predicted.slices[last[0]].end_us
    eager = replace(
        predicted, slices=tuple(replace(s, ready_us=s.start_us) for s in predicted.slices)
    )
    assert 0 < eager.idle_share < predicted.idle_share < 1


def test_fills_are_told_from_the_rest(tmp_path: Path) -> None:
    plan = mla_decode.plan([0, 4000, 0], 16, 2, num_workers=4)
    drawn = timeline.predicted(plan)
    fills = [s for s in drawn.slices if isinstance(s.instruction, Fill)]
    assert fills
    assert {s.kind for s in fills} == {"fill"}
    assert {s.request for s in fills} == {None}
    assert all("fill" in s.label for s in fills)
    write_png(drawn, tmp_path / "timeline.png")
    names = [e["name"] for e in events(drawn, tmp_path) if e.get("cat") == "fill"]
    assert len(names) == len(fills)


# Measured


def test_measured_timeline_has_the_recorded_times(plan: mla_decode.Plan) -> None:
    drawn = timeline.measured(plan, records(plan), "NVIDIA H200")
    first = plan.start_us.min()
    for s, start, end in zip(drawn.slices, plan.start_us, plan.end_us, strict=True):
        assert s.start_us == pytest.approx(start - first + 0.05, abs=2e-3)
        assert s.end_us == pytest.approx(end - first, abs=2e-3)
        assert [p.name for p in s.phases] == ["load", "compute", "store"]
    assert [s.worker for s in drawn.slices] == plan.worker.tolist()
    assert drawn.source == "measured"


def test_instruction_without_a_record_is_named(plan: mla_decode.Plan) -> None:
    table = records(plan)
    table[5, 0] = 0
    with pytest.raises(QueueError, match="instruction 5 was not executed"):
        timeline.measured(plan, table, "GPU")


def test_phase_without_a_record_is_left_out(plan: mla_decode.Plan) -> None:
    table = records(plan)
    table[3, 2:6] = 0  # neither load nor compute, as a no-op
    drawn = timeline.measured(plan, table, "GPU")
    assert [p.name for p in drawn.slices[3].phases] == ["store"]
    table[3, 2:] = 0
    drawn = timeline.measured(plan, table, "GPU")
    assert drawn.slices[3].phases == ()
    assert drawn.slices[3].start_us == drawn.slices[3].end_us == drawn.slices[3].fetched_us
    assert 0 < drawn.makespan_us < 2 * plan.predicted_us


def test_records_of_another_kind_are_refused(plan: mla_decode.Plan) -> None:
    with pytest.raises(ShapeError, match="timings: expected"):
        timeline.measured(plan, records(plan)[:, :7], "GPU")
    with pytest.raises(ShapeError, match="timings: expected"):
        timeline.measured(plan, records(plan)[:3], "GPU")
    with pytest.raises(DtypeError, match="timings: expected"):
        timeline.measured(plan, records(plan).long(), "GPU")


def test_interpreters_records_make_a_timeline() -> None:
    case = make_case([3000], 8)
    plan = mla_decode.plan([3000], 8, num_workers=4)
    drawn = timeline.measured(plan, timing_records(case, plan), "cpu")
    assert drawn.source == "interpreter"
    assert drawn.makespan_us > 0
    assert {s.worker for s in drawn.slices} == {0}
    assert drawn.num_workers == 1


# Perfetto


def events(drawn: Timeline, folder: Path) -> list[dict[str, Any]]:
    path = write_trace(drawn, folder / "trace.json")
    document = json.loads(path.read_text())
    assert document["otherData"]["shape"] == drawn.shape
    found: list[dict[str, Any]] = document["traceEvents"]
    return found


@pytest.fixture(params=("predicted", "measured"))
def drawn(request: pytest.FixtureRequest, plan: mla_decode.Plan, predicted: Timeline) -> Timeline:
    if request.param == "predicted":
        return predicted
    return timeline.measured(plan, records(plan), "NVIDIA H200")


def test_trace_has_one_named_track_per_sm(drawn: Timeline, tmp_path: Path) -> None:
    names = {
        e["tid"]: e["args"]["name"] for e in events(drawn, tmp_path) if e["name"] == "thread_name"
    }
    assert names == {worker: f"SM {worker}" for worker in range(24)}


def test_trace_names_every_slice(drawn: Timeline, tmp_path: Path) -> None:
    slices = [e for e in events(drawn, tmp_path) if e["ph"] == "X" and "uid" in e["args"]]
    assert {e["args"]["queue position"] for e in slices} == set(range(len(drawn.slices)))
    for e in slices:
        s = drawn.slices[e["args"]["queue position"]]
        assert e["tid"] == s.worker
        assert e["name"].startswith(f"uid {s.instruction.uid}: ")
        if isinstance(s.instruction, Partial):
            assert f"{s.instruction.q_batch} keys [{s.instruction.start}, " in e["name"]


def test_trace_tells_requests_from_kv_heads_and_runs_in_short(tmp_path: Path) -> None:
    plan = mla_decode.plan([9000, 64], 16, num_kv_heads=2, num_workers=8)
    drawn = timeline.predicted(plan)
    everyone = {(request, kv_head) for request in (0, 1) for kv_head in (0, 1)}
    assert {(s.request, s.kv_head) for s in drawn.slices if s.kind == "partial"} == everyone
    found = [e["args"] for e in events(drawn, tmp_path) if "uid" in e.get("args", {})]
    partials = [args for args in found if "keys" in args]
    assert {(args["request"], args["KV head"]) for args in partials} == everyone
    runs = [args["inputs"] for args in found if "inputs" in args]
    reductions = [s for s in drawn.slices if isinstance(s.instruction, Reduction)]
    assert runs
    for text, s in zip(runs, sorted(reductions, key=lambda s: (s.worker, s.end_us)), strict=True):
        assert isinstance(s.instruction, Reduction)
        inputs = s.instruction.inputs
        assert text.startswith(f"{len(inputs)} slots, {inputs[0]} to {inputs[-1]}")


def test_slices_of_a_track_nest_or_follow_each_other(drawn: Timeline, tmp_path: Path) -> None:
    """What Perfetto needs: no partial overlap on one track."""
    by_track: dict[int, list[tuple[float, float]]] = {}
    for e in events(drawn, tmp_path):
        if e["ph"] == "X":
            assert e["dur"] > 0
            by_track.setdefault(e["tid"], []).append((e["ts"], e["ts"] + e["dur"]))
    slack = 2e-4  # times are written with four decimals
    for spans in by_track.values():
        open_until: list[float] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= start + slack:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + slack
            open_until.append(end)


def test_arrows_start_in_the_writer_and_end_in_the_reader(drawn: Timeline, tmp_path: Path) -> None:
    found = events(drawn, tmp_path)
    spans = {
        e["args"]["queue position"]: (e["tid"], e["ts"], e["ts"] + e["dur"])
        for e in found
        if e["ph"] == "X" and "queue position" in e["args"]
    }
    starts = {e["id"]: e for e in found if e["ph"] == "s"}
    ends = {e["id"]: e for e in found if e["ph"] == "f"}
    assert len(starts) == len(ends) == len(drawn.flows) > 0
    for number, (source, target) in enumerate(drawn.flows):
        for event, index in ((starts[number], source), (ends[number], target)):
            track, begin, end = spans[index]
            assert event["tid"] == track
            assert begin - 1e-3 <= event["ts"] <= end + 1e-3


# The picture


def test_picture_has_colors_for_what_ran(drawn: Timeline, tmp_path: Path) -> None:
    path = write_png(drawn, tmp_path / "folder" / "timeline.png")
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[1] >= 1200
    orange = (pixels[..., 0] > 0.85) & (pixels[..., 2] < 0.4)
    blue = (pixels[..., 2] > 0.55) & (pixels[..., 0] < 0.5)
    share = {"reduction": orange.mean(), "partial": blue.mean()}
    assert all(value > 0.005 for value in share.values()), share


def test_busier_timelines_have_more_ink(plan: mla_decode.Plan, tmp_path: Path) -> None:
    """A picture that ignored its slices would not change when they do."""
    full = timeline.predicted(plan)
    half = replace(full, slices=full.slices[: len(full.slices) // 2], flows=())

    def ink(drawn: Timeline, name: str) -> float:
        pixels = matplotlib.image.imread(write_png(drawn, tmp_path / name))[..., :3]
        return float((pixels.max(-1) - pixels.min(-1) > 0.2).mean())

    stretched = replace(half, slices=(*half.slices, replace(full.slices[-1], index=0)))
    assert ink(stretched, "half.png") < 0.9 * ink(full, "full.png")


@pytest.mark.parametrize("count", (1, 40))
def test_picture_of_any_batch_can_be_drawn(count: int, tmp_path: Path) -> None:
    plan = mla_decode.plan([64] * count, 8, num_workers=4)
    write_png(timeline.predicted(plan), tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


def test_shape_is_told_in_words() -> None:
    assert timeline.describe_shape(mla_decode.plan([70], 8)) == (
        "1 request of 70 tokens, 1 new token, 8 heads"
    )
    ragged = mla_decode.plan([70, 0], 8, [0, 3], num_kv_heads=2)
    assert timeline.describe_shape(ragged) == (
        "2 requests of 70, 0 tokens, 0 to 3 new tokens, 8 heads of 2 KV heads"
    )
    many = mla_decode.plan([70, 4096, 80, 90, 100], 8, 2)
    assert (
        timeline.describe_shape(many) == "5 requests of 70 to 4,096 tokens, 2 new tokens, 8 heads"
    )
