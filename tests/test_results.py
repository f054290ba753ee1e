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
    assert record.get("failed_tests", []) == []
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


def explained(page: str) -> str:
    """The part of docs/performance.md that says why shapes got slower."""
    _, _, after = page.partition("\n## Slower than before\n")
    return after.partition("\n## ")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_shape_lost_without_a_reason(path: Path) -> None:
    past = results.history(path)
    if not past:
        pytest.skip("these are the first results of this device")
    new, old = (json.loads(file.read_text())["benchmark"] for file in (path, past[-1]))
    page = explained((results.ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))
    lost = {shape: ratio for shape, ratio in results.losses(new, old).items() if shape not in page}
    assert not lost, "slower; gain it back, or say why under 'Slower than before'"


def test_losses_are_those_beyond_noise() -> None:
    def rows(**us: float) -> list[dict[str, object]]:
        return [{"shape": shape, "impl": "mla_decode", "us": value} for shape, value in us.items()]

    old, new = rows(a=10.0, b=10.0, c=10.0), rows(a=10.2, b=10.4, d=99.0)
    assert results.losses(new, old) == {"b": pytest.approx(1.04)}
    peers = [row | {"impl": "flash_mla"} for row in rows(a=1.0)]
    assert results.losses(new, peers) == {}
    assert explained("# x\n\n## Slower than before\n\nb: why\n\n## y\n\na") == "\nb: why\n"


def test_new_results_keep_the_old_ones(tmp_path: Path) -> None:
    record = json.loads(FILES[0].read_text())
    path = results.install(record | {"source_digest": "1", "commit": "first"}, tmp_path)
    results.install(record | {"source_digest": "1", "commit": "again"}, tmp_path)
    assert results.history(path) == []
    results.write_pending("no GPU", "2", tmp_path)
    results.install(record | {"source_digest": "2", "commit": "second"}, tmp_path)
    results.install(record | {"source_digest": "3", "commit": "third"}, tmp_path)
    assert [file.name for file in results.history(path)] == ["0001-again.json", "0002-second.json"]
    assert results.result_files(tmp_path) == [path]
    assert not (tmp_path / results.PENDING).exists()
    assert json.loads(path.read_text())["commit"] == "third"
