"""tools/fit_cost_model.py finds constants again from what they predict, by times and by choices."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mla_decode
import numpy as np
import pytest
from mla_decode import _scheduler, planning
from mla_decode._scheduler import CostModel
from mla_decode.planning import DEFAULT_CLUSTERS

from benchmarks.shapes import SHAPES, Shape
from tools import fit_cost_model, measure_cost_model, refine_cost_model

TRUE_COST = CostModel(
    launch_us=1.4,
    partial_fixed_us=5.5,
    partial_next_us=1.5,
    partial_tile_us=0.018,
    partial_tile_compute_us=1.1,
    reduction_fixed_us=3.0,
    reduction_kib_us=0.025,
)

BATCHES: list[tuple[list[int], int, int]] = [
    ([65536], 16, 1),
    ([4641, 45118, 1730, 1696], 16, 4),
    ([1024] * 8, 16, 1),
    ([4096] * 128, 16, 1),
    ([8192] * 32, 64, 1),
    ([2048] * 20, 32, 1),
    ([4096] * 128, 128, 1),
    ([500 + 37 * i for i in range(150)], 16, 1),
    ([64], 16, 1),
]


def measurements(with_timings: bool) -> dict[str, object]:
    runs = []
    for seq_lens, heads, tokens in BATCHES:
        words = _scheduler.plan(seq_lens, heads, tokens, 132, CostModel()).instructions
        _, start, end, us = _scheduler.simulate(words, heads, tokens, 132, TRUE_COST)
        run = {"seq_lens": seq_lens, "num_heads": heads, "new_tokens": tokens, "us": us}
        run["instructions"] = words.tolist()
        if with_timings:
            run["timings_us"] = np.stack([start, end], axis=1).tolist()
        runs.append(run)
    return {"device": "a test", "num_workers": 132, "runs": runs}


@pytest.mark.parametrize("with_timings", [False, True], ids=["totals", "timings"])
def test_a_fit_explains_the_runs(with_timings: bool) -> None:
    base = CostModel()
    runs = fit_cost_model.read_runs(measurements(with_timings), base)  # type: ignore[arg-type]
    result = fit_cost_model.fit(runs, base)
    assert result.rms_before > 0.05
    assert result.rms_after < 0.005


def test_a_fit_to_timings_finds_the_constants() -> None:
    base = CostModel()
    runs = fit_cost_model.read_runs(measurements(with_timings=True), base)  # type: ignore[arg-type]
    fitted = fit_cost_model.fit(runs, base).cost
    for name in ("launch_us", "partial_fixed_us", "partial_tile_us", "partial_tile_compute_us"):
        assert getattr(fitted, name) == pytest.approx(getattr(TRUE_COST, name), rel=0.05), name


def test_what_is_fixed_or_unmeasured_stays() -> None:
    base = CostModel()
    document = measurements(with_timings=False)
    document["runs"] = document["runs"][-1:]  # type: ignore[index]  # one partial, no reduction
    runs = fit_cost_model.read_runs(document, base)  # type: ignore[arg-type]
    result = fit_cost_model.fit(runs, base, fixed=["launch_us"])
    assert result.cost.launch_us == base.launch_us
    assert result.cost.reduction_kib_us == pytest.approx(base.reduction_kib_us, rel=1e-6)
    assert "reduction_kib_us" in result.uncertain


@pytest.mark.parametrize("seq_lens", ([1024] * 8, [4096] * 200), ids=["mates", "adopting"])
def test_a_run_is_planned_anew_as_it_was_measured(seq_lens: list[int]) -> None:
    """With the clusters of the device, whose plans may leave SMs out."""
    clusters = [(2, 66), (8, 15)]
    plan = _scheduler.plan(seq_lens, 16, 1, 132, CostModel(), clusters=clusters)
    assert plan.instructions[:, 11].any() or plan.instructions[:, 13].any()
    run = {"seq_lens": seq_lens, "num_heads": 16, "new_tokens": 1, "us": plan.predicted_us}
    document = json.loads(json.dumps({"num_workers": 132, "clusters": clusters, "runs": [run]}))
    (read,) = fit_cost_model.read_runs(document, CostModel())
    np.testing.assert_array_equal(read.instructions, plan.instructions)
    assert read.num_workers == plan.num_workers
    assert read.residuals(CostModel()) == pytest.approx([0.0], abs=1e-6)


def test_the_command_writes_a_cost_model_file(tmp_path: Path) -> None:
    source, target = tmp_path / "runs.json", tmp_path / "model.json"
    source.write_text(json.dumps(measurements(with_timings=False)), encoding="utf-8")
    assert fit_cost_model.main([str(source), "--output", str(target)]) == 0
    document = json.loads(target.read_text(encoding="utf-8"))
    assert document["device"] == "a test"
    fitted = [
        CostModel.from_dict(document[key]).partial_tile_compute_us
        for key in ("cost", "narrow_cost", "narrowest_cost")
    ]
    assert len(set(fitted)) == 3


def test_a_run_without_a_time_is_rejected() -> None:
    document = {"runs": [{"seq_lens": [64], "num_heads": 16, "new_tokens": 1}]}
    with pytest.raises(ValueError, match=r"runs\[0\]: expected 'us' or 'timings_us'"):
        fit_cost_model.read_runs(document, CostModel())


def planned_in_several_ways() -> dict[str, object]:
    """Batches under several models, with and without clusters, as TRUE_COST has their times."""
    rng = random.Random(5)
    clusters = [(2, 66), (8, 15)]
    runs = []
    for i, (seq_lens, heads, tokens) in enumerate(BATCHES):
        for model in (
            CostModel(),
            *(measure_cost_model.other_model(CostModel(), rng) for _ in "ab"),
        ):
            for shares in (True, False):
                plan = _scheduler.plan(
                    seq_lens, heads, tokens, 132, model, clusters=clusters if shares else []
                )
                us = _scheduler.simulate(
                    plan.instructions, heads, tokens, plan.num_workers, TRUE_COST
                )[3]
                how = {"shares": shares, "planned_by": model.as_dict(), "us": us}
                what = {"seq_lens": seq_lens, "num_heads": heads, "new_tokens": tokens}
                runs.append({"batch": str(i), **what, **how})
    return json.loads(  # type: ignore[no-any-return]
        json.dumps({"num_workers": 132, "clusters": clusters, "runs": runs})
    )


def test_refined_models_choose_better_and_predict_better() -> None:
    document = planned_in_several_ways()
    runs_of = {"cost": fit_cost_model.read_runs(document, CostModel())}
    cheap_merges = CostModel(reduction_fixed_us=0.2, reduction_kib_us=0.002, dependency_us=0.05)
    refined = refine_cost_model.refine(runs_of, {"cost": cheap_merges}, steps=400)
    assert refined.batches == len(BATCHES)
    assert refined.before.regret > 0.005
    assert refined.after.regret < 0.5 * refined.before.regret
    assert refined.after.rms < 0.5 * refined.before.rms
    true_score = refine_cost_model.Measured(runs_of)
    perfect = true_score.score(true_score.predict("cost", TRUE_COST))
    assert perfect.regret == 0.0
    assert perfect.rms < 1e-6


def test_refining_leaves_alone_what_is_fixed() -> None:
    runs_of = {"cost": fit_cost_model.read_runs(planned_in_several_ways(), CostModel())}
    fixed = [name for name in CostModel().as_dict() if name != "launch_us"]
    model = refine_cost_model.refine(runs_of, {"cost": CostModel()}, 20, fixed=fixed).models["cost"]
    differ = {name for name, us in model.as_dict().items() if us != CostModel().as_dict()[name]}
    assert differ == {"launch_us"}


def test_refining_wants_batches_under_several_plans() -> None:
    runs_of = {"cost": fit_cost_model.read_runs(measurements(False), CostModel())}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="several plans"):
        refine_cost_model.refine(runs_of, {"cost": CostModel()}, 1)


def test_batches_to_measure_differ_by_their_seed() -> None:
    first = [shape for shape, _ in zip(measure_cost_model.batches(3), range(90), strict=False)]
    again = [shape for shape, _ in zip(measure_cost_model.batches(3), range(90), strict=False)]
    other = [shape for shape, _ in zip(measure_cost_model.batches(4), range(90), strict=False)]
    assert first == again
    assert first[0] != other[0]
    even = [shape for shape in first if shape.name.startswith("even")]
    assert 20 < len(even) < 45


def test_no_named_shape_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even batches are often as large as those; one that is the same is left out."""
    named = SHAPES["B64_512_q2_h16"]
    other = replace(named, name="another", num_heads=32)
    drawn = itertools.cycle([replace(named, name="the same"), other])
    monkeypatch.setattr(measure_cost_model, "even_shape", lambda rng: next(drawn))
    shapes = [shape for shape, _ in zip(measure_cost_model.batches(3), range(90), strict=False)]
    assert {shape.name for shape in shapes if shape.seq_lens == named.seq_lens} == {"another"}


@pytest.mark.parametrize(("heads", "sizes"), ((16, {16}), (32, {16, 32}), (128, {16, 32, 64})))
def test_a_batch_is_planned_in_groups_of_all_sizes(heads: int, sizes: set[int]) -> None:
    few = Shape("few", (4000, 900), 1, heads)
    ways = list(measure_cost_model.ways_to_plan(few, 132, "NVIDIA H200", random.Random(0)))
    assert {way["group_rows"] for way in ways} == sizes
    assert len(ways) == (2 + measure_cost_model.OTHER_MODELS) * len(sizes)
    many = Shape("many", (4000,) * 120, 1, heads)
    ways = list(measure_cost_model.ways_to_plan(many, 132, "NVIDIA H200", random.Random(0)))
    assert {way["group_rows"] for way in ways} == {max(sizes)}


def pretend_to_measure(
    monkeypatch: pytest.MonkeyPatch, shapes: list[Shape], times_of: Callable[..., object]
) -> None:
    """Let the command draw these batches, and time them so, on a GPU that is not there."""

    class Properties:
        name = "NVIDIA H200"
        multi_processor_count = 132

    monkeypatch.setattr(measure_cost_model, "times_of", times_of)
    monkeypatch.setattr(measure_cost_model, "batches", lambda seed: iter(shapes))
    monkeypatch.setattr(measure_cost_model, "clusters_of", lambda device: DEFAULT_CLUSTERS)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: Properties)
    monkeypatch.setattr(planning, "_gpu", lambda device: None)


def test_what_is_measured_is_read_again_as_it_ran(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The command, on a GPU that is not there: plans, their runs in a file, and plans from it."""
    ran: dict[str, list[mla_decode.Plan]] = {}

    def times_of(shape: Shape, prepare: Mapping[str, Any], replays: int) -> dict[str, list[float]]:
        ran[shape.name] = [each.args[0] for each in prepare.values()]
        return {
            name: [plan.predicted_us] for name, plan in zip(prepare, ran[shape.name], strict=True)
        }

    shapes = [Shape("few", (4000, 900), 1, 128), Shape("even", (1024,) * 8, 1, 16)]
    pretend_to_measure(monkeypatch, shapes, times_of)
    target = tmp_path / "runs.json"
    assert measure_cost_model.main([str(target), "--seconds", "60"]) == 0

    runs = fit_cost_model.read_runs(json.loads(target.read_text(encoding="utf-8")), CostModel())
    plans = [plan for shape in shapes for plan in ran[shape.name]]
    assert len(runs) == len(plans) > 5
    assert {run.batch for run in runs} == {"few", "even"}
    for run, plan in zip(runs, plans, strict=True):
        np.testing.assert_array_equal(run.instructions, plan.instructions)
        assert (run.group_rows, run.num_workers) == (plan.group_rows, plan.num_workers)
        assert run.us == plan.predicted_us


def test_what_was_measured_before_a_wrong_output_is_in_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def times_of(shape: Shape, prepare: Mapping[str, Any], replays: int) -> dict[str, list[float]]:
        if shape.name == "wrong":
            raise RuntimeError("wrong output")
        return {name: [10.0] for name in prepare}

    shapes = [Shape(name, (900,), 1, 16) for name in ("right", "wrong")]
    pretend_to_measure(monkeypatch, shapes, times_of)
    monkeypatch.setattr(measure_cost_model, "SECONDS_BETWEEN_WRITES", 0.0)
    target = tmp_path / "runs.json"
    with pytest.raises(RuntimeError, match="wrong output"):
        measure_cost_model.main([str(target)])
    document = json.loads(target.read_text(encoding="utf-8"))
    assert {run["batch"] for run in document["runs"]} == {"right"}


def test_measuring_without_a_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert measure_cost_model.main(["nowhere.json"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
