"""The measured floor: the line through streams of several sizes."""

from __future__ import annotations

import pytest
import torch
from mla_decode import cost

from benchmarks import floor


def test_line_through_streams_that_lie_on_one() -> None:
    sizes = [round(megabytes * 1e6) for megabytes in floor.MEGABYTES]
    fitted = floor.fit(sizes, [1.6 + size / 4.6e6 for size in sizes])
    assert fitted.launch_us == pytest.approx(1.6)
    assert fitted.bytes_per_us == pytest.approx(4.6e6)
    assert fitted.us(4.6e6) == pytest.approx(2.6)


def test_small_streams_count_as_much_as_large_ones() -> None:
    fitted = floor.fit([1e6, 1e7, 1e9], [2.0, 4.0, 200.0])
    errors = [fitted.us(b) / us - 1 for b, us in ((1e6, 2.0), (1e7, 4.0), (1e9, 200.0))]
    assert max(map(abs, errors)) < 0.05


@pytest.mark.gpu
def test_streams_of_this_gpu_lie_on_a_line() -> None:
    sizes, us, fitted = floor.measure(replays=5)
    for size, taken in zip(sizes, us, strict=True):
        assert fitted.us(size) == pytest.approx(taken, rel=0.08)
    assert 0.3 < fitted.launch_us < 5
    assert fitted.bytes_per_us < 1.2 * cost.FLOOR_BYTES_PER_US  # it reads what it is asked to


@pytest.mark.gpu
def test_odd_streams_are_refused() -> None:
    from benchmarks import _stream

    data = torch.zeros(64, dtype=torch.uint8, device="cuda")
    for address, size in ((data.data_ptr() + 8, 16), (data.data_ptr(), 24)):
        with pytest.raises(ValueError, match="multiples of 16"):
            _stream.stream(address, size, 0, 0)
