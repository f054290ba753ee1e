"""The committed results belong to the committed sources, and say that they are right."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

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
    assert wrong_outputs(record) == []


def wrong_outputs(record: dict[str, Any]) -> list[str]:
    return [
        f"{row['shape']}, {row['impl']}: {row['rel_err']}"
        for row in record["benchmark"]
        if not row["rel_err"] <= MAX_REL_ERR
    ]


def test_a_wrong_output_of_any_implementation_is_a_failure() -> None:
    rows = [
        {"shape": "a", "impl": impl, "rel_err": rel_err}
        for impl, rel_err in zip(results.IMPLS, (2e-3, 1e30, 4e-3), strict=True)
    ]
    assert wrong_outputs({"benchmark": rows}) == ["a, flash_mla: 1e+30", "a, flashinfer_fa3: 0.004"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_file_is_plausible_and_lacks_nothing_that_the_one_before_had(path: Path) -> None:
    record = json.loads(path.read_text())
    assert results.absurd(record) == []
    for before in results.history(path)[-1:]:
        assert results.missing(record, json.loads(before.read_text())) == []


@pytest.fixture
def record() -> dict[str, Any]:
    """Committed results, for tests to change."""
    return dict(json.loads(FILES[0].read_text()))


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("shape", "B1_nothing", "expected a shape of benchmarks/shapes.py"),
        ("us", -1.0, "us: expected more than 0, got -1.0"),
        ("us", 0, "us: expected more than 0, got 0"),
        ("gbps", 1.0, "gbps: expected "),
        ("tflops", 1.0, "tflops: expected "),
        ("floor_us", 1.0, "floor_us: expected "),
    ],
)
def test_an_absurd_figure_is_named(
    field: str, value: float | str, problem: str, record: dict[str, Any]
) -> None:
    row = record["benchmark"][1]
    assert results.absurd(record) == []
    row[field] = value
    (found,) = results.absurd(record)
    assert found.startswith(f"{row['shape']}, {row['impl']}: {problem}")


def test_results_that_are_nearly_empty_lack_what_was_there_before(record: dict[str, Any]) -> None:
    assert results.missing(record, record) == []
    rows, cases = record["benchmark"], record["correctness"]
    fewer = {"benchmark": rows[:1] + rows[2:], "correctness": cases[: int(0.95 * len(cases))]}
    assert results.missing(record | fewer, record) == [
        f"{rows[1]['shape']}: expected a row of {rows[1]['impl']}, as before"
    ]
    (few,) = results.missing(record | {"correctness": cases[:1]}, record)
    assert few == f"correctness: expected at least {0.9 * len(cases):.0f} rows, got 1"
    ours = [row for row in rows if row["impl"] == "mla_decode"]
    assert len(results.missing(record | {"benchmark": ours}, record)) == len(rows) - len(ours)


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
    assert without_reason(new, old, page) == []


def without_reason(new: list[dict[str, Any]], old: list[dict[str, Any]], page: str) -> list[str]:
    """Say of which losses ``page`` has no item with the shape's name and its newest figure."""
    times = {row["shape"]: row["us"] for row in new if row["impl"] == "mla_decode"}
    return [
        f"{shape}: {ratio:.3f} times as long; gain it back, or say why under 'Slower than before': "
        f"expected an item of this shape that has its newest figure, {times[shape]:.1f}"
        for shape, ratio in results.losses(new, old).items()
        if not has_figure(item_of(page, shape), f"{times[shape]:.1f}")
    ]


def item_of(page: str, shape: str) -> str:
    """The items of a list that begin with the shape's name."""
    items = re.split(r"^- ", page, flags=re.MULTILINE)[1:]
    return "\n".join(item for item in items if re.match(rf"`?{re.escape(shape)}\b", item))


def has_figure(text: str, figure: str) -> bool:
    return re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", text) is not None


def test_a_reason_holds_for_the_figure_that_it_names_and_for_no_later_loss() -> None:
    def rows(us: float) -> list[dict[str, Any]]:
        return [{"shape": "B1_q1_h16", "impl": "mla_decode", "us": us}]

    page = (
        "\n- B1_q1_h16, 20.0 us, then 15.1;\n  and 25.04 too.\n- B1_q1_h16_bs1, 31.0 and 99.0 us\n"
    )
    assert without_reason(rows(15.13), rows(10.0), page) == []
    assert without_reason(rows(10.2), rows(10.0), "") == []
    for us in (5.1, 25.0, 31.0, 99.0):  # within other figures, or of another shape
        (lost,) = without_reason(rows(us), rows(1.0), page)
        assert lost.startswith("B1_q1_h16: ") and lost.endswith(f"newest figure, {us:.1f}")


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
    results.install(record | {"source_digest": "2", "commit": "second"}, tmp_path)
    results.install(record | {"source_digest": "3", "commit": "third"}, tmp_path)
    assert [file.name for file in results.history(path)] == ["0001-again.json", "0002-second.json"]
    assert results.result_files(tmp_path) == [path]
    assert json.loads(path.read_text())["commit"] == "third"


def test_results_are_numbered_after_the_last_even_where_one_was_removed(tmp_path: Path) -> None:
    record = json.loads(FILES[0].read_text())
    for digest in "1234":
        path = results.install(record | {"source_digest": digest, "commit": digest}, tmp_path)
    results.history(path)[0].unlink()
    results.install(record | {"source_digest": "5", "commit": "5"}, tmp_path)
    names = [file.name for file in results.history(path)]
    assert names == ["0002-2.json", "0003-3.json", "0004-4.json"]


def test_only_results_of_the_present_sources_end_what_is_pending(tmp_path: Path) -> None:
    record = json.loads(FILES[0].read_text())
    pending = results.write_pending("no GPU", "now", tmp_path)
    results.install(record | {"source_digest": "older"}, tmp_path, digest="now")
    assert pending.exists()
    results.install(record | {"source_digest": "now"}, tmp_path, digest="now")
    assert not pending.exists()
    results.write_pending("no GPU", source_digest(), tmp_path)
    results.install(record | {"source_digest": source_digest()}, tmp_path)
    assert not pending.exists()
