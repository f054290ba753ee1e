"""The real `benchmarks.measure.measure` over a made-up GPU: what it times and what it trusts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_timing import L2_BYTES, FakeGpu, fake_gpu

from benchmarks import bench, case, measure, report
from benchmarks.implementations import NotOfferedError, Prepared
from benchmarks.measure import FLUSHES, WARMUP_REPLAYS, Row
from benchmarks.shapes import Floor, Shape

REPLAYS = 5
SHAPE = Shape("small", (300, 70), 2, 16)
COPIES = case.number_of_copies(SHAPE.kv_bytes, L2_BYTES)
CALLS = COPIES * case.calls_per_copy(COPIES, SHAPE.kv_bytes, L2_BYTES)
Make = Callable[[case.Case], Prepared]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu(monkeypatch) as fake:
        on_cpu = SimpleNamespace(**vars(torch))
        on_cpu.device = lambda *where: torch.device("cpu")
        monkeypatch.setattr(measure, "torch", on_cpu)
        yield fake


def implementation(
    gpu: FakeGpu,
    *,
    spoil: Callable[[torch.Tensor, int], object] = lambda out, number: None,
    launches: bool = True,
    synchronize: Callable[[], None] = lambda: None,
) -> Make:
    """One that copies the reference; ``spoil`` is told which call since the capture it is."""

    def make(made: case.Case) -> Prepared:
        replayed_calls = 0

        def call(i: int) -> torch.Tensor:
            out = made.reference[i].bfloat16()

            def work() -> None:
                nonlocal replayed_calls
                out.copy_(made.reference[i])
                spoil(out, replayed_calls)
                replayed_calls += 1

            if gpu.capturing is not None and launches:
                gpu.enqueue(work)
            return out

        return Prepared(call, synchronize=synchronize)

    return make


def row_of(make: Make, shape: Shape = SHAPE) -> Row:
    (row,) = measure.measure(shape, ["mla_decode"], replays=REPLAYS, prepare={"mla_decode": make})
    return row


def in_replay(number: int) -> range:
    """The calls of a timed replay."""
    first = (WARMUP_REPLAYS + number) * CALLS
    return range(first, first + CALLS)


def test_a_right_output_has_the_median_of_the_timed_replays_per_call(gpu: FakeGpu) -> None:
    gpu.us = [9e9] * WARMUP_REPLAYS + [CALLS * us for us in (30.0, 10.0, 20.0, 90.0, 1.0)]
    row = row_of(implementation(gpu))
    assert (row.error, row.us) == ("", pytest.approx(20.0))
    assert row.replays_us == pytest.approx([30.0, 10.0, 20.0, 90.0, 1.0])
    assert 0 < row.rel_err < measure.MAX_REL_ERR
    assert row.gbps == pytest.approx(SHAPE.bytes / 20.0 / 1e3)
    assert row.tflops == pytest.approx(SHAPE.flop / 20.0 / 1e6)


def test_a_step_is_timed_as_a_whole(gpu: FakeGpu) -> None:
    gpu.us = [70.0]
    make = implementation(gpu)
    (row,) = measure.measure(SHAPE, ["x"], replays=3, layers=7, prepare={"x": make})
    assert (row.error, row.us) == ("", pytest.approx(70.0))


def test_outputs_are_poisoned_and_l2_is_flushed_directly_before_each_timed_replay(
    gpu: FakeGpu,
) -> None:
    row_of(implementation(gpu))
    replay = [*["flush"] * FLUSHES, "event", "replay", "event"]
    timed = [*["poison"] * CALLS, *replay] * REPLAYS
    assert gpu.log == replay * WARMUP_REPLAYS + timed


def test_replays_of_implementations_alternate(gpu: FakeGpu) -> None:
    gpu.us = [CALLS * us for us in (1.0, 2.0)] * (WARMUP_REPLAYS + REPLAYS)
    makes = {"a": implementation(gpu), "b": implementation(gpu)}
    a, b = measure.measure(SHAPE, ["a", "b"], replays=REPLAYS, prepare=makes)
    assert a.replays_us == pytest.approx([1.0] * REPLAYS)
    assert b.replays_us == pytest.approx([2.0] * REPLAYS)


def test_a_wrong_output_is_an_error_and_its_figure_is_kept_nowhere(
    gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu.us = [7.77 * CALLS]
    wrong = implementation(gpu, spoil=lambda out, number: out.mul_(1.01))
    monkeypatch.setattr(measure, "IMPLEMENTATIONS", {"mla_decode": wrong})
    monkeypatch.setattr(bench.floor, "of_this_gpu", lambda: Floor(measured=True))
    file, out = tmp_path / "shapes.json", tmp_path / "rows.json"
    entry = {"name": "own", "seq_lens": [300, 70], "new_tokens": 2, "num_heads": 16}
    file.write_text(json.dumps([entry]), encoding="utf-8")
    arguments = ["--file", str(file), "--impls", "mla_decode", "--out", str(out)]
    assert bench.main([*arguments, "--replays", "2", "--report", str(tmp_path / "report")]) == 1
    shown = capsys.readouterr().out
    assert "** wrong output: relative error 1" in shown
    written = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "7.77" not in shown + written
    assert json.loads(out.read_text(encoding="utf-8")) == []


def test_a_launch_that_does_nothing_is_an_error(gpu: FakeGpu) -> None:
    row = row_of(implementation(gpu, launches=False))
    assert row.error.startswith("wrong output: relative error inf")


@pytest.mark.parametrize("number", range(REPLAYS))
def test_an_output_that_is_wrong_in_one_timed_replay_only_is_an_error(
    gpu: FakeGpu, number: int
) -> None:
    wrong = in_replay(number)

    def spoil(out: torch.Tensor, call: int) -> None:
        if call == wrong[-1]:
            out.zero_()

    row = row_of(implementation(gpu, spoil=spoil))
    assert row.rel_err == pytest.approx(1.0)
    assert row.error.startswith("wrong output: relative error 1.00e+00, expected at most 3e-03")


@pytest.mark.parametrize("tokens", [1, (1, 1, 2, 1)], ids=["uniform", "mixed"])
def test_a_wrong_long_request_does_not_hide_behind_short_ones(
    gpu: FakeGpu, tokens: int | tuple[int, ...]
) -> None:
    shape = Shape("long behind short", (1, 2, 16384, 1), tokens, 16)

    def spoil(out: torch.Tensor, call: int) -> None:
        out[2].mul_(1.1)  # also of the mixed one: its third token is request 2's first

    row = row_of(implementation(gpu, spoil=spoil), shape)
    assert row.rel_err < measure.MAX_REL_ERR
    assert "of request 2 (16384 keys)" in row.error
    assert row.error.endswith("expected at most 1e-02")


def test_an_error_too_small_for_the_bound_of_a_request_is_one_of_the_whole(gpu: FakeGpu) -> None:
    row = row_of(implementation(gpu, spoil=lambda out, call: out.mul_(1.006)))
    assert measure.MAX_REL_ERR < row.rel_err < measure.MAX_REQUEST_REL_ERR
    assert row.error.startswith("wrong output: relative error ")


def test_one_wrong_row_of_128_heads_is_an_error(gpu: FakeGpu) -> None:
    def spoil(out: torch.Tensor, call: int) -> None:
        out[0, 0, 77].zero_()

    shape = Shape("many rows", (64,) * 8, 1, 128)
    assert "of request 0 (64 keys)" in row_of(implementation(gpu, spoil=spoil), shape).error
    assert row_of(implementation(gpu), shape).error == ""


def test_what_a_launch_reports_is_an_error(gpu: FakeGpu) -> None:
    def synchronize() -> None:
        if gpu.replayed:
            raise RuntimeError("the kernel reported a timeout")

    row = row_of(implementation(gpu, synchronize=synchronize))
    assert row.error == "RuntimeError: the kernel reported a timeout"
    assert bench.exit_code([row]) == 1


def test_what_cannot_be_prepared_leaves_the_others_their_figures(gpu: FakeGpu) -> None:
    def absent(made: case.Case) -> Prepared:
        raise ImportError("not installed")

    def not_offered(made: case.Case) -> Prepared:
        raise NotOfferedError("blocks of 64")

    makes = {"a": absent, "b": not_offered, "c": implementation(gpu)}
    a, b, c, d = measure.measure(SHAPE, ["a", "b", "c", "d"], replays=1, prepare=makes)
    assert [row.error for row in (a, b, c, d)] == ["ImportError: not installed", "", "", ""]
    assert bench.with_figures([a, b, c, d]) == [c]


def test_a_shape_that_cannot_be_made_leaves_the_others_their_figures(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = case.make_case

    def too_large(shape: Shape, *others: Any, **options: Any) -> case.Case:
        if shape.name == "large":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(shape, *others, **options)

    monkeypatch.setattr(measure, "make_case", too_large)
    monkeypatch.setattr(measure, "IMPLEMENTATIONS", {"mla_decode": implementation(gpu)})
    monkeypatch.setattr(bench.floor, "of_this_gpu", lambda: Floor(measured=True))
    shapes = [Shape(name, (300,), 1, 16) for name in ("first", "large", "third")]
    first, large, third = bench.run(shapes, ["mla_decode"], 1)
    assert (first.error, third.error) == ("", "")
    assert large.error == "OutOfMemoryError: CUDA out of memory"
    page = report.write_report(tmp_path, [first, large, third], "a GPU")
    assert "- large, mla_decode: OutOfMemoryError" in page.read_text(encoding="utf-8")


def test_the_worst_errors_mean_what_relative_error_means() -> None:
    for tokens in (2, (2, 1, 3)):
        made = case.make_case(
            Shape("small", (130, 3, 40), tokens, 4), torch.device("cpu"), copies=2
        )
        errors = case.WorstErrors(made)
        outs = [reference.bfloat16() for reference in made.reference]
        outs[1].view(-1, 4, 512)[-1].mul_(2)
        for i in (1, 0, 1):
            errors.add(i, outs[i])
        assert errors.whole == pytest.approx(case.relative_error(outs[1], made.reference[1]))
        last = slice(-made.shape.tokens[-1], None)
        own = [values.view(-1, 4, 512)[last] for values in (outs[1], made.reference[1])]
        assert errors.worst_request == (2, pytest.approx(case.relative_error(*own)))
