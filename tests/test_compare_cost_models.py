"""What tools/compare_cost_models.py does without a GPU."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from fake_timing import fake_measure
from mla_decode import cost

from benchmarks.shapes import Shape, random_shapes
from tools import compare_cost_models, side_by_side
from tools.compare_cost_models import (
    ALL,
    MODEL_FILE,
    PRESENT,
    batches,
    compare,
    models_to_compare,
    plans_of,
    variant,
)
from tools.side_by_side import Gain

SHAPE = Shape("one", (8192,), 1, 16)


def test_a_variant_changes_what_it_names() -> None:
    model = cost.CostModel()
    changed = variant(model, "mates_fixed_us=0.25,mates_kib_us=0.5").as_dict()
    assert changed == model.as_dict() | {"mates_fixed_us": 0.25, "mates_kib_us": 0.5}


@pytest.mark.parametrize("changes", ["mates=1", "mates_fixed_us", "mates_fixed_us=fast", ""])
def test_a_variant_of_no_constant_is_refused(changes: str) -> None:
    with pytest.raises(ValueError):
        variant(cost.CostModel(), changes)


def test_batches_are_of_one_kind_of_kernel() -> None:
    drawn = random_shapes(60, 3)
    wide, narrow, narrowest = (batches(kind, 60, 3) for kind in cost.KERNELS)
    assert wide and narrow and narrowest
    assert all(shape.num_heads * max(shape.tokens) > 32 for shape in wide)
    assert all(16 < shape.num_heads * max(shape.tokens) <= 32 for shape in narrow)
    assert all(shape.num_heads * max(shape.tokens) <= 16 for shape in narrowest)
    assert {shape.name for shape in wide + narrow + narrowest} < {shape.name for shape in drawn}


def test_plans_that_are_the_same_are_one() -> None:
    shape = replace(SHAPE, seq_lens=(4096,) * 8)
    model = cost.load(None, 16)
    models = {
        PRESENT: model,
        "same": model,
        "dear": variant(model, "reduction_fixed_us=1000,mates_fixed_us=1000"),
    }
    plans = plans_of(shape, models)
    assert plans["same"] is plans[PRESENT]
    assert plans["dear"] is not plans[PRESENT]
    assert len(plans["dear"].instructions) == 8, "nothing is cut where merging is dear"


DEAR = "reduction_fixed_us=1000,mates_fixed_us=1000,adopt_fixed_us=1000"


def models_of(shape: Shape) -> dict[str, cost.CostModel]:
    model = cost.load(None, shape.num_heads)
    return {PRESENT: model, "dear": variant(model, DEAR), "same": model}


def test_only_plans_that_differ_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_by_side, "measure", fake_measure({PRESENT: 10.0, "dear": 11.0}))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    shapes = [replace(SHAPE, seq_lens=(length,)) for length in (64, 8192)]
    gains = compare(shapes, models_of(SHAPE), replays=3)
    assert gains["dear"].ratios == [10 / 11], "one tile is planned in one way only"
    assert str(gains["same"]) == "nothing differs"
    assert capsys.readouterr().out == f"{SHAPE.name}: 10.0 us; dear 0.909\n"


def test_a_wrong_output_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = fake_measure({PRESENT: 10.0, "dear": 11.0}, error="wrong output: relative error 1")
    monkeypatch.setattr(side_by_side, "measure", wrong)
    with pytest.raises(RuntimeError, match="one, present: wrong output"):
        compare([SHAPE], models_of(SHAPE), replays=3)


def test_a_gain_is_a_geometric_mean() -> None:
    assert str(Gain([0.5, 2.0])) == "1.0000 over 2 batches, worst 0.500, best 2.000"


def test_files_of_constants_are_compared_as_users_plan(tmp_path: Path) -> None:
    dear = tmp_path / "dear.json"
    kinds = {cost.file_key(kind): cost.load(None, rows) for kind, rows in cost.KERNELS.items()}
    constants = {key: variant(model, DEAR).as_dict() for key, model in kinds.items()}
    dear.write_text(json.dumps(constants), encoding="utf-8")
    same = tmp_path / "same.json"
    same.write_text(json.dumps({key: model.as_dict() for key, model in kinds.items()}))
    models = models_to_compare(ALL, [str(dear), str(same)], "NVIDIA H200")
    assert list(models) == [PRESENT, str(dear), str(same)]
    few = Shape("few", (402,), 1, 128)
    plans = plans_of(few, models)
    assert plans[PRESENT].group_rows < 64, "the planner chooses the size of row groups"
    assert plans[str(same)] is plans[PRESENT]
    assert plans[str(dear)] is not plans[PRESENT]
    assert MODEL_FILE not in os.environ


def test_all_kinds_want_files() -> None:
    with pytest.raises(ValueError, match="mates_fixed_us=1: expected a file"):
        models_to_compare(ALL, ["mates_fixed_us=1"], "NVIDIA H200")
    assert len(batches(ALL, 60, 3)) == sum(len(batches(kind, 60, 3)) for kind in cost.KERNELS)


def test_a_variant_that_is_none_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    for arguments in (["all", "mates_fixed_us=1"], ["wide", "mates=1"]):
        with pytest.raises(SystemExit):
            compare_cost_models.main(arguments)
        assert arguments[1] in capsys.readouterr().err


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert compare_cost_models.main(["wide", "mates_fixed_us=1"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
