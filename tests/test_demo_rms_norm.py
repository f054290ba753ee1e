"""The tutorial opcode runs on the framework, and neither knows of the other application."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from demos import noop_cost, rms_norm

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = re.compile("[Aa]ttention|MLA|[Mm]la|[Ss]oftmax|KV|[Kk]v")
FRAMEWORK = sorted((ROOT / "megakernel").iterdir())
DEMO = [
    ROOT / "demos" / name for name in ("rms_norm.cuh", "rms_norm.cu", "rms_norm.py", "noop_cost.py")
]


@pytest.mark.parametrize("path", [*FRAMEWORK, *DEMO], ids=lambda path: path.name)
def test_framework_and_demo_say_nothing_of_attention(path: Path) -> None:
    found = [line for line in path.read_text().splitlines() if FOREIGN.search(line)]
    assert found == []


def test_the_search_for_foreign_words_finds_one() -> None:
    assert FOREIGN.search((ROOT / "instructions" / "layout.h").read_text())
    assert len(FRAMEWORK) > 10


def test_the_opcode_is_short() -> None:
    assert len((ROOT / "demos" / "rms_norm.cuh").read_text().splitlines()) < 150


def test_python_and_the_kernel_agree_on_the_words() -> None:
    if rms_norm._rms_norm is None:
        pytest.skip("the demo's kernel is not built")
    for name in (
        "INSTRUCTION_WORDS",
        "QUEUE_STATE_WORDS",
        "OPCODE_NOOP",
        "OPCODE_RMS_NORM",
        "MAX_ROWS",
    ):
        assert getattr(rms_norm, name) == getattr(rms_norm._rms_norm, name)


@pytest.mark.parametrize(("rows", "layers"), [(1, 1), (24, 2), (25, 1), (100, 3)])
def test_the_queue_covers_every_row_of_every_layer_once(rows: int, layers: int) -> None:
    queue = rms_norm.build_queue(rows, layers, noop_every=2)
    seen = [
        (words[rms_norm.LAYER], row)
        for words in queue.tolist()
        if words[0] == rms_norm.OPCODE_RMS_NORM
        for row in range(
            words[rms_norm.ROW_BEGIN], words[rms_norm.ROW_BEGIN] + words[rms_norm.NUM_ROWS]
        )
    ]
    assert seen == [(layer, row) for layer in range(layers) for row in range(rows)]


def make_inputs(rows: int, cols: int, layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.full((layers + 1, rows, cols), torch.nan)
    x[0] = torch.randn(rows, cols)
    return x, torch.rand(layers, cols) + 0.5


def test_the_words_compute_rms_norm() -> None:
    x, weights = make_inputs(50, 36, 3)
    rms_norm.interpret(rms_norm.build_queue(50, 3), x, weights)
    expected = rms_norm.reference(x[0], weights)
    assert rms_norm.relative_error(x[1:], expected) <= rms_norm.MAX_REL_ERR


def test_a_queue_out_of_order_is_refused() -> None:
    x, weights = make_inputs(50, 36, 2)
    queue = rms_norm.build_queue(50, 2).flip(0)
    with pytest.raises(ValueError, match="not raised before"):
        rms_norm.interpret(queue, x, weights)


def test_the_demo_runs_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert rms_norm.main(["--rows", "60", "--cols", "64", "--layers", "2"]) == 0
    assert "queue order: relative error" in capsys.readouterr().out


def test_the_cost_of_a_no_op_is_the_slope() -> None:
    offset, slope = noop_cost.fit_line((64, 128, 256), [5 + 0.25 * n for n in (64, 128, 256)])
    assert (offset, slope) == pytest.approx((5, 0.25))
    assert noop_cost.noop_queue(3)[:, :2].tolist() == [[0, 0], [0, 1], [0, 2]]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "cols", "layers", "num_ctas"),
    [(1, 4, 1, 0), (24, 2304, 1, 1), (1000, 2048, 3, 0), (4099, 516, 4, 0), (500, 128, 6, 3)],
)
def test_the_gpu_computes_rms_norm(rows: int, cols: int, layers: int, num_ctas: int) -> None:
    x, weights = make_inputs(rows, cols, layers)
    queue = rms_norm.build_queue(rows, layers, noop_every=3)
    launch = rms_norm.Launcher(queue, x.cuda(), weights.cuda(), num_ctas)
    expected = rms_norm.reference(x[0], weights)
    for _ in range(3):  # flags and tickets go on from launch to launch, without a reset
        launch.x[1:] = torch.nan
        launch()
        rms_norm.synchronize()
        got = launch.x[1:].cpu()
        assert rms_norm.relative_error(got, expected) <= rms_norm.MAX_REL_ERR


@pytest.mark.gpu
def test_a_wait_without_end_is_reported_and_the_next_launch_works() -> None:
    x, weights = make_inputs(48, 64, 2)
    good = rms_norm.build_queue(48, 2)
    bad = good.clone()
    bad[0, rms_norm.WAIT_FLAG] = len(bad) - 1  # raised by nobody
    launch = rms_norm.Launcher(bad, x.cuda(), weights.cuda())
    launch()
    with pytest.raises(RuntimeError, match="expired"):
        rms_norm.synchronize()
    launch.queue = good.cuda()
    launch.x[1:] = torch.nan
    launch()
    rms_norm.synchronize()
    expected = rms_norm.reference(x[0], weights)
    assert rms_norm.relative_error(launch.x[1:].cpu(), expected) <= rms_norm.MAX_REL_ERR
