"""The committed results belong to the committed sources, and say that they are right."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from benchmarks.shapes import SHAPES
from tools import results
from tools.source_digest import source_digest

FILES = results.result_files()
MAX_REL_ERR = 3e-3
MAX_TIMES_FLASH_MLA = 1.5


def test_results_were_measured_with_these_sources() -> None:
    warning = results.check_digests(source_digest())
    if warning:
        warnings.warn(warning, stacklevel=1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_file_is_complete(path: Path) -> None:
    record = json.loads(path.read_text())
    results.check_schema(record)
    assert path.stem == results.slug(record["device"])
    assert record["correctness"], "no correctness rows"
    ours = [row["shape"] for row in record["benchmark"] if row["impl"] == "mla_decode"]
    assert ours == list(SHAPES), "every shape once, in the order of the table"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_file_records_no_failure(path: Path) -> None:
    record = json.loads(path.read_text())
    assert [row["case"] for row in record["correctness"] if not row["passed"]] == []
    ours = [row for row in record["benchmark"] if row["impl"] == "mla_decode"]
    assert [row["shape"] for row in ours if not row["rel_err"] <= MAX_REL_ERR] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_shape_is_far_behind_flash_mla(path: Path) -> None:
    rows = json.loads(path.read_text())["benchmark"]
    times = {(row["shape"], row["impl"]): row["us"] for row in rows}
    slow = {
        shape: us / times[shape, "flash_mla"]
        for (shape, impl), us in times.items()
        if impl == "mla_decode"
        and (shape, "flash_mla") in times
        and us > MAX_TIMES_FLASH_MLA * times[shape, "flash_mla"]
    }
    assert slow == {}
