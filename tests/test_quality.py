"""get_quality: the start of the earliest partial, counted back from the finish."""

from __future__ import annotations

import math

import mla_decode
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_decode._scheduler import CostModel, get_quality

COST = CostModel()
HOPELESS = -999999999.0
# What a partial needs besides its tiles, until a reduction sees it.
FIXED_US = COST.partial_fixed_us + COST.dependency_us
TILE_US = COST.partial_tile_compute_us  # the memory is not the limit for so few
# 16 heads, 512 fp32 columns.
INPUT_US = 32 * COST.reduction_kib_us

TIMES = st.lists(st.floats(-1000.0, 0.0), min_size=1, max_size=20)


def test_one_processor_computes_everything() -> None:
    assert get_quality([-3.0], 1, 1, 640) == pytest.approx(-3.0 - FIXED_US - 10 * TILE_US)


def test_an_unfull_tile_counts_as_one() -> None:
    assert get_quality([0.0], 1, 1, 65) == get_quality([0.0], 1, 1, 128)
    assert get_quality([0.0], 1, 1, 64) > get_quality([0.0], 1, 1, 65)


def test_inputs_of_one_reduction_are_due_one_after_the_other() -> None:
    # Two processors, five tiles each; the second input is due one input earlier.
    expected = -INPUT_US - FIXED_US - 5 * TILE_US
    assert get_quality([0.0], 2, 1, 640) == pytest.approx(expected)


def test_inputs_of_two_reductions_are_due_together() -> None:
    assert get_quality([0.0, 0.0], 2, 1, 640) == pytest.approx(-FIXED_US - 5 * TILE_US)


@pytest.mark.parametrize(("processors", "tiles"), [(2, 10), (8, 37), (8, 3), (40, 200)])
def test_tiles_are_dealt_so_that_the_earliest_start_is_latest(processors: int, tiles: int) -> None:
    latest = [-i * INPUT_US - FIXED_US for i in range(processors)]
    starts = sorted({t - n * TILE_US for t in latest for n in range(1, tiles + 1)}, reverse=True)

    def room(start: float) -> int:
        return sum(max(0, math.floor((t - start) / TILE_US + 1e-9)) for t in latest)

    best = next(start for start in starts if room(start) >= tiles)
    assert get_quality([0.0], processors, 1, 64 * tiles) == pytest.approx(best)


def test_a_reduction_that_is_due_far_too_early_is_not_fed() -> None:
    expected = 2 * -INPUT_US - FIXED_US - math.ceil(10 / 3) * TILE_US
    assert get_quality([0.0, -1e6], 3, 1, 640) == pytest.approx(expected, abs=TILE_US)


@pytest.mark.parametrize(
    ("reductions", "processors", "tokens"), [(2, 1, 1), (1, 3, 4), (3, 8, 3), (100, 99, 1)]
)
def test_more_reductions_than_processors_is_hopeless(
    reductions: int, processors: int, tokens: int
) -> None:
    assert get_quality([0.0] * reductions, processors, tokens, 4096) == HOPELESS


@pytest.mark.parametrize(("reductions", "processors", "tokens"), [(1, 1, 1), (2, 8, 4), (3, 3, 1)])
def test_as_many_reductions_as_processors_is_not(
    reductions: int, processors: int, tokens: int
) -> None:
    assert get_quality([0.0] * reductions, processors, tokens, 4096) > HOPELESS


@settings(max_examples=200, deadline=None)
@given(TIMES, st.integers(20, 200), st.integers(1, 100_000), st.floats(-500.0, 500.0))
def test_shifting_the_reductions_shifts_the_start(
    times: list[float], processors: int, length: int, shift: float
) -> None:
    shifted = get_quality([t + shift for t in times], processors, 1, length)
    # A tile may move where two processors tie.
    expected = get_quality(times, processors, 1, length) + shift
    assert shifted == pytest.approx(expected, abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(TIMES, st.integers(20, 80), st.integers(1, 100_000))
def test_more_tokens_to_read_start_earlier(
    times: list[float], processors: int, length: int
) -> None:
    now = get_quality(times, processors, 1, length)
    assert get_quality(times, processors, 1, length + 64) <= now + 1e-9


@settings(max_examples=200, deadline=None)
@given(TIMES, st.integers(20, 80), st.integers(1, 100_000))
def test_more_processors_never_hurt(times: list[float], processors: int, length: int) -> None:
    # Below 90 processors the memory is not the limit and tiles cost the same.
    now = get_quality(times, processors, 1, length)
    assert get_quality(times, processors + 1, 1, length) >= now - 1e-9


@settings(max_examples=200, deadline=None)
@given(TIMES, st.integers(21, 80), st.integers(1, 100_000))
def test_the_order_of_the_reductions_does_not_matter(
    times: list[float], processors: int, length: int
) -> None:
    forwards = get_quality(times, processors, 1, length)
    assert get_quality(times[::-1], processors, 1, length) == forwards


@settings(max_examples=200, deadline=None)
@given(TIMES, st.integers(1, 200), st.integers(1, 4), st.integers(1, 2**31 - 1))
def test_the_start_precedes_the_finish(
    times: list[float], processors: int, tokens: int, length: int
) -> None:
    quality = get_quality(times, processors, tokens, length)
    assert quality == HOPELESS or quality <= max(times) - FIXED_US - TILE_US + 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1, 1, 1), "next_times: expected at least one reduction"),
        (([math.nan], 1, 1, 1), "next_times: expected finite times"),
        (([0.0], 0, 1, 1), "num_processors: expected 1 to 16384, got 0"),
        (([0.0], 1, 0, 1), "num_tokens: expected at least 1, got 0"),
        (([0.0], 1, 1, 0), "seq_length: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[list[float], int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        get_quality(*arguments)


def test_the_package_offers_it_under_its_old_name() -> None:
    assert mla_decode.__get_quality__([0.0], 1, 1, 64) == get_quality([0.0], 1, 1, 64)
