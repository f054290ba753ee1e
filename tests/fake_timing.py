"""Timing without a GPU, for tests of the tools that compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from benchmarks.case import Case, make_case, relative_error
from benchmarks.implementations import Prepared
from benchmarks.measure import MAX_REL_ERR, Row
from benchmarks.shapes import Shape


def fake_measure(us: dict[str, float], error: str = "") -> Callable[..., list[Row]]:
    """As `benchmarks.measure.measure`, on the CPU: checks what is prepared, and makes times up."""

    def measure(
        shape: Shape,
        impls: list[str],
        *,
        replays: int,
        prepare: Mapping[str, Callable[[Case], Prepared]],
    ) -> list[Row]:
        assert list(prepare) == impls
        assert set(impls) == set(us)
        case = make_case(shape, torch.device("cpu"), copies=2)
        for make in prepare.values():
            prepared = make(case)
            for i in range(case.copies):
                assert relative_error(prepared.call(i), case.reference[i]) < MAX_REL_ERR
        return [Row(shape, name, error=error, replays_us=[us[name]] * replays) for name in impls]

    return measure
