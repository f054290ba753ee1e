"""Seeds, the gpu marker, and the record of correctness rows.

A test marked ``gpu`` is skipped where no Hopper GPU can run the built kernels; the reason stands in
the terminal summary.

The fixture ``record_correctness(case, rel_err, lse_max_abs_err, passed)`` appends one JSON line to
the file named by MLA_DECODE_CORRECTNESS, from which ``make gpu-check`` makes the results file;
without the variable it does nothing. Call it before the assertion that may fail:

    def test_decode(record_correctness):
        ...
        record_correctness("h16 q4 lengths 1,65", rel_err, lse_err, passed)
        assert passed
"""

from __future__ import annotations

import os

# Before torch starts its threads: spinning while they wait, they would take the processor from
# whatever else the machine does.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

SEED = 20250730

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

RecordCorrectness = Callable[[str, float, float, bool], None]


@cache
def why_no_gpu() -> str:
    """Return why GPU tests cannot run here; empty if they can."""
    if not torch.cuda.is_available():
        return f"no CUDA GPU (torch {torch.__version__})"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"{torch.cuda.get_device_name()} is no Hopper GPU (capability {capability})"
    try:
        from mla_decode import _kernels
    except ImportError as error:
        return f"the kernels are not built ({error})"
    return _kernels.available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if "needs a GPU: " in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.section("GPU tests did NOT run", sep="!", yellow=True, bold=True)
        terminalreporter.line(f"{len(skipped)} tests skipped: {why_no_gpu()}")
        terminalreporter.line("`make gpu-check` on a machine with a Hopper GPU runs them.")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers for every test, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002
    torch.manual_seed(SEED)


@pytest.fixture
def record_correctness() -> RecordCorrectness:
    """Append a correctness row for the results file; see the top of this file."""
    path = os.environ.get("MLA_DECODE_CORRECTNESS")

    def record(case: str, rel_err: float, lse_max_abs_err: float, passed: bool) -> None:
        if path is None:
            return
        row = {
            "case": case,
            "rel_err": float(rel_err),
            "lse_max_abs_err": float(lse_max_abs_err),
            "passed": bool(passed),
        }
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")

    return record
