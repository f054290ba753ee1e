"""The measured floor: the line through streams of several sizes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from mla_decode import cost

import benchmarks
from benchmarks import floor
from benchmarks.shapes import ASSUMED, SHAPES, Floor, Shape


def test_line_through_streams_that_lie_on_one() -> None:
    sizes = [round(megabytes * 1e6) for megabytes in floor.MEGABYTES]
    fitted = floor.fit(sizes, [1.6 + size / 4.6e6 for size in sizes])
    assert fitted.launch_us == pytest.approx(1.6)
    assert fitted.bytes_per_us == pytest.approx(4.6e6)
    assert fitted.stream_us(4.6e6) == pytest.approx(2.6)
    assert fitted.measured


def test_small_streams_count_as_much_as_large_ones() -> None:
    fitted = floor.fit([1e6, 1e7, 1e9], [2.0, 4.0, 200.0])
    errors = [fitted.stream_us(b) / us - 1 for b, us in ((1e6, 2.0), (1e7, 4.0), (1e9, 200.0))]
    assert max(map(abs, errors)) < 0.05


def test_the_slower_of_stream_and_arithmetic_is_the_floor() -> None:
    shape = Shape("one", (1000,), 1, 128)
    memory = Floor(launch_us=1.0, bytes_per_us=shape.bytes / 4, flop_per_us=shape.flop / 3)
    assert memory.us(shape) == pytest.approx(5)
    assert memory.is_memory_bound(shape)
    compute = replace(memory, flop_per_us=shape.flop / 6)
    assert compute.us(shape) == pytest.approx(6)
    assert not compute.is_memory_bound(shape)


def test_the_assumed_floor_is_that_of_the_package() -> None:
    for shape in SHAPES.values():
        own = cost.floor_us(shape.seq_lens, shape.num_heads, shape.new_tokens)
        assert ASSUMED.us(shape) == pytest.approx(own)


def test_a_floor_is_read_as_it_was_written() -> None:
    floor = Floor(1.25, 4.5e6, measured=True)
    assert Floor(**json.loads(json.dumps(floor.as_json()))) == floor


@pytest.fixture
def without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(benchmarks, "_stream", raising=False)
    monkeypatch.setitem(sys.modules, "benchmarks._stream", None)


@pytest.mark.usefixtures("without_the_kernel")
def test_a_missing_kernel_is_said_loudly_and_an_h200_assumed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert floor.of_this_gpu() == ASSUMED
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("** the streaming kernel was not built (")
    assert second.startswith("** x floor") and "ASSUMED" in second


@pytest.mark.usefixtures("without_the_kernel")
def test_the_streams_themselves_need_the_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert floor.run(replays=1) == 2
    assert "the streaming kernel was not built" in capsys.readouterr().err


@pytest.mark.gpu
def test_streams_of_this_gpu_lie_on_a_line() -> None:
    sizes, us, fitted = floor.measure(replays=5)
    for size, taken in zip(sizes, us, strict=True):
        assert fitted.stream_us(size) == pytest.approx(taken, rel=0.08)
    assert 0.3 < fitted.launch_us < 5
    assert fitted.bytes_per_us < 1.2 * ASSUMED.bytes_per_us  # it reads what it is asked to


@pytest.mark.gpu
def test_the_benchmark_counts_with_this_gpus_floor() -> None:
    assert floor.of_this_gpu().measured


@pytest.mark.gpu
def test_odd_streams_are_refused() -> None:
    from benchmarks import _stream

    data = torch.zeros(64, dtype=torch.uint8, device="cuda")
    for address, size in ((data.data_ptr() + 8, 16), (data.data_ptr(), 24)):
        with pytest.raises(ValueError, match="multiples of 16"):
            _stream.stream(address, size, 0, 0)
