"""What tools/compare_cost_models.py does without a GPU."""

from __future__ import annotations

from dataclasses import replace

import mla_decode
import pytest
from mla_decode import cost

from benchmarks.shapes import Shape, random_shapes
from tools import compare_cost_models
from tools.compare_cost_models import PRESENT, Gain, batches, compare, plans_of, variant

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
    wide, narrow = (batches(kind, 60, 3) for kind in ("wide", "narrow"))
    assert wide and narrow
    assert all(shape.num_heads * max(shape.tokens) > cost.NARROW_ROWS for shape in wide)
    assert all(shape.num_heads * max(shape.tokens) <= cost.NARROW_ROWS for shape in narrow)
    assert {shape.name for shape in wide + narrow} < {shape.name for shape in drawn}


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


def test_only_plans_that_differ_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = []

    def measure(
        shape: object, plans: dict[str, mla_decode.Plan], replays: int
    ) -> dict[str, list[float]]:
        timed.append(plans)
        first = plans[PRESENT]
        return {name: [10.0 if plan is first else 11.0] * replays for name, plan in plans.items()}

    monkeypatch.setattr(compare_cost_models, "measure", measure)
    model = cost.load(None, 16)
    dear = variant(model, "reduction_fixed_us=1000,mates_fixed_us=1000,adopt_fixed_us=1000")
    shapes = [replace(SHAPE, seq_lens=(length,)) for length in (64, 8192)]
    gains = compare(shapes, {PRESENT: model, "dear": dear, "same": model}, replays=3)
    (plans,) = timed  # of the one that has more than a tile
    assert plans["same"] is plans[PRESENT] is not plans["dear"]
    assert gains["dear"].ratios == [10 / 11]
    assert str(gains["same"]) == "no plan differs"
    assert capsys.readouterr().out == f"{SHAPE.name}: 10.0 us; dear 0.909\n"


def test_a_gain_is_a_geometric_mean() -> None:
    assert str(Gain([0.5, 2.0])) == "2 plans differ: 1.0000, worst 0.500, best 2.000"


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert compare_cost_models.main(["wide", "mates_fixed_us=1"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
