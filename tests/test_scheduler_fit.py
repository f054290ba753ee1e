"""tools/fit_cost_model.py finds constants again from what they predict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mla_decode import _scheduler
from mla_decode._scheduler import CostModel

from tools import fit_cost_model

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
