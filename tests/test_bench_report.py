"""The benchmark's report, from rows that a GPU once gave; and shapes from a file."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench, report
from benchmarks.measure import Row
from benchmarks.shapes import SHAPES, Floor, Shape, read_shapes
from tools.results import FOLDER

H200 = FOLDER / "nvidia-h200.json"
US = (900.0, 990.0)
FLOOR = Floor(1.25, 4.5e6, measured=True)
PICTURES = ["multiples.png", "roofline.png", "latency.png"]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    measured = json.loads(H200.read_text(encoding="utf-8"))["benchmark"]
    return [
        Row(SHAPES[row["shape"]], row["impl"], us=row["us"], rel_err=row["rel_err"], floor=FLOOR)
        for row in measured
    ]


def test_the_report_shows_every_row(rows: list[Row], tmp_path: Path) -> None:
    page = report.write_report(tmp_path / "new" / "folder", rows, "NVIDIA H200")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# NVIDIA H200\n")
    assert "whichever is longer: 1.25 us + bytes / 4.50 TB/s (measured on this GPU)" in text
    for row in rows:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row.shape.name} |"))
        assert f" {row.us:.1f} ({row.us / FLOOR.us(row.shape):.2f}) " in line
    for picture in PICTURES:
        assert f"]({picture})" in text
        assert (page.parent / picture).read_bytes().startswith(b"\x89PNG")
    with (page.parent / "table.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(line["us"]) for line in table] == [round(row.us, 3) for row in rows]
    assert [float(line["floor_us"]) for line in table] == [round(row.floor_us, 4) for row in rows]
    assert len(json.loads((page.parent / "rows.json").read_text(encoding="utf-8"))) == len(rows)


def test_the_report_shows_rates_and_how_many_times_as_long_peers_take(tmp_path: Path) -> None:
    memory, arithmetic = SHAPES["B1_64k_q1_h16"], SHAPES["B128_8k_q2_h128"]
    rows = [
        Row(memory, "mla_decode", us=20.0, floor=FLOOR),
        Row(memory, "flash_mla", us=50.0, floor=FLOOR),
        Row(arithmetic, "mla_decode", us=1000.0, floor=FLOOR),
        Row(arithmetic, "flash_mla", us=999.0, error="wrong output", floor=FLOOR),
    ]
    page = report.write_report(tmp_path, rows, "a GPU")
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    limits = [f"{FLOOR.us(shape):.1f}" for shape in (memory, arithmetic)]
    multiples = [f"{row.us:.1f} ({row.us / row.floor_us:.2f})" for row in rows]
    ours, theirs = (f"{memory.bytes / us / 1e3:.0f} GB/s" for us in (20.0, 50.0))
    flops = f"{arithmetic.flop / 1000.0 / 1e6:.0f} TFLOP/s"
    assert table == [
        ["shape", "limit, us", "mla_decode", "rate", "flash_mla", "rate", "flash_mla / mla_decode"],
        [memory.name, limits[0], multiples[0], ours, multiples[1], theirs, "2.50"],
        [arithmetic.name, limits[1], multiples[2], flops, "–", "–", "–"],
    ]
    (first, *_), of_csv = (
        json.loads((tmp_path / "rows.json").read_text(encoding="utf-8")),
        csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")),
    )
    assert first["x_floor"] == float(next(of_csv)["x_floor"]) == round(20 / FLOOR.us(memory), 3)


def test_a_report_of_peers_alone_compares_with_nothing(tmp_path: Path) -> None:
    row = Row(SHAPES["B8_1k_q1_h16"], "flash_mla", us=15.0, floor=FLOOR)
    page = report.write_report(tmp_path, [row], "a GPU").read_text(encoding="utf-8")
    assert "| shape | limit, us | flash_mla | rate |\n" in page


def test_any_name_of_a_shape_can_be_reported(tmp_path: Path) -> None:
    for name in ("cost_$x^{_$", "a|b\nc", r"\frac{$"):
        row = Row(Shape(name, (4096,), 1, 16), "mla_decode", us=5.0, rel_err=1e-3)
        text = report.write_report(tmp_path, [row], "a GPU").read_text(encoding="utf-8")
        (line,) = [line for line in text.splitlines() if "GB/s |" in line]
        assert len(re.findall(r"(?<!\\)\|", line)) == 5  # four cells
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        assert next(csv.DictReader(file))["shape"] == name


def test_without_matplotlib_the_rest_of_the_report_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    row = Row(SHAPES["B8_1k_q1_h16"], "mla_decode", us=5.0, rel_err=1e-3)
    page = report.write_report(tmp_path, [row], "a GPU")
    why = "No pictures: expected matplotlib, it is not installed."
    assert why in page.read_text(encoding="utf-8")
    assert why in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "rows.json", "table.csv"}


@pytest.mark.parametrize("count", [1, 3, 13])
def test_labels_of_the_latencies_do_not_overlap(rows: list[Row], count: int) -> None:
    shapes = list(SHAPES.values())[:count]
    figure = report._new_figure((13.0, 4.4))
    report._draw_latency(figure, [row for row in rows if row.shape in shapes], shapes)
    figure.canvas.draw()
    for axes in figure.axes:
        labels = [*axes.get_xticklabels(minor=False), *axes.get_xticklabels(minor=True)]
        boxes = [
            label.get_window_extent()
            for label in labels
            if label.get_text()
            and axes.get_xlim()[0] <= label.get_position()[0] <= axes.get_xlim()[1]
        ]
        boxes.sort(key=lambda box: box.x0)
        assert len(boxes) >= 2
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize("count", [1, 13])
def test_the_legend_of_the_multiples_covers_no_bar(rows: list[Row], count: int) -> None:
    shapes = list(SHAPES.values())[:count]
    figure = report._new_figure(report._multiples_size(shapes))
    report._draw_multiples(figure, [row for row in rows if row.shape in shapes], shapes)
    figure.canvas.draw()
    (axes,) = figure.axes
    (legend,) = [*figure.legends, *filter(None, [axes.get_legend()])]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_a_copy_without_its_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "0123abc")
    assert bench.commit() == "0123abc"


def test_a_wrong_result_has_no_figure(tmp_path: Path) -> None:
    shape = SHAPES["B8_1k_q1_h16"]
    wrong = Row(shape, "flash_mla", us=7.77, rel_err=0.5, error="wrong output: relative error 0.5")
    right = Row(shape, "mla_decode", us=15.25, rel_err=2e-3)
    page = report.write_report(tmp_path, [right, wrong], "a GPU")
    for name in ("report.md", "table.csv", "rows.json"):
        assert "7.77" not in (tmp_path / name).read_text(encoding="utf-8")
    assert "- B8_1k_q1_h16, flash_mla: wrong output" in page.read_text(encoding="utf-8")
    ours, theirs = bench.table_lines([right, wrong])
    assert "7.77" not in theirs and theirs.endswith("** wrong output: relative error 0.5")
    assert "flash_mla" not in ours


def test_nothing_that_ran_is_a_report_without_pictures(tmp_path: Path) -> None:
    failed = Row(SHAPES["B8_1k_q1_h16"], "mla_decode", error="a reason")
    page = report.write_report(tmp_path, [failed], "a GPU")
    assert "png" not in page.read_text(encoding="utf-8")
    assert math.isnan(failed.us)


def test_shapes_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    own = {"name": "a", "seq_lens": [40, 3], "new_tokens": 2, "num_heads": 16}
    mixed = own | {"name": "b", "new_tokens": [1, 3], "block_size": 16}
    path.write_text(json.dumps([own, mixed]), encoding="utf-8")
    uniform, ragged = read_shapes(path)
    assert (uniform.name, uniform.seq_lens, uniform.tokens) == ("a", (40, 3), (2, 2))
    assert (ragged.tokens, ragged.block_size, ragged.is_mixed) == ((1, 3), 16, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, r"\[0\]: expected the fields"),
        ({"seq_lens": []}, r"\[0\]\.seq_lens: expected a list of whole numbers"),
        ({"seq_lens": [0]}, r"\[0\]\.seq_lens: expected whole numbers of at least 1, got 0"),
        ({"new_tokens": [1, 2]}, r"\[0\]\.new_tokens: expected 1, got 2"),
        ({"new_tokens": 41}, r"\[0\]\.seq_lens: expected at least the new tokens"),
        ({"num_heads": "16"}, r"\[0\]: expected whole numbers of at least 1, got '16'"),
    ],
)
def test_a_wrong_shape_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    shape = {"name": "a", "seq_lens": [40], "new_tokens": 2, "num_heads": 16} | change
    path.write_text(json.dumps([shape]), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_shapes(path)


def test_a_missing_file_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--file", "nowhere.json"])
    assert "--file: " in capsys.readouterr().err


@pytest.mark.parametrize("floor", [FLOOR, Floor()], ids=["measured", "assumed"])
def test_the_floor_is_measured_first_and_named_under_the_table(
    floor: Floor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(shape: Shape, impls: list[str], *, replays: int, floor: Floor) -> list[Row]:
        return [Row(shape, impl, us=2 * floor.us(shape), floor=floor) for impl in impls]

    monkeypatch.setattr(bench, "measure", measured)
    monkeypatch.setattr(bench, "title", lambda: "a GPU")
    monkeypatch.setattr(bench.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench.floor, "of_this_gpu", lambda: floor)
    (row,) = bench.run([SHAPES["B8_1k_q1_h16"]], ["mla_decode"], 3)
    assert row.floor is floor
    line, under = capsys.readouterr().out.splitlines()[-2:]
    assert " 2.00 " in line
    assert under == f"floor: {floor}"
    assert ("ASSUMED" in under) != floor.measured


def test_a_step_is_printed_beside_its_peer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(shape: object, impls: list[str], *, replays: int, layers: int) -> list[Row]:
        assert (impls, replays, layers) == (["mla_decode", "flash_mla"], 3, 61)
        rows = [
            Row(SHAPES["B8_1k_q1_h16"], impl, us=us) for impl, us in zip(impls, US, strict=True)
        ]
        if shape is SHAPES["imb4_q4_h16"]:
            rows[1].error = "wrong output"
        return rows

    monkeypatch.setattr(bench, "measure", measured)
    monkeypatch.setattr(bench, "title", lambda: "a GPU")
    monkeypatch.setattr(bench.torch.cuda, "empty_cache", lambda: None)
    bench.run_steps([SHAPES["B8_1k_q1_h16"], SHAPES["imb4_q4_h16"]], 61, 3)
    good, bad = capsys.readouterr().out.splitlines()[-2:]
    assert good.split() == ["B8_1k_q1_h16", "0.900", "0.990", "1.10x", "flash_mla"]
    assert "0.990" not in bad
    assert "flash_mla: wrong output" in bad


@pytest.mark.parametrize("other", [["--out", "x"], ["--report", "x"], ["--impls", "flash_mla"]])
def test_a_step_refuses_what_it_would_ignore(
    other: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--step", *other])
    message = f"--step prints a table of its own: expected no {other[0]}"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["--planning", "--floor"])
@pytest.mark.parametrize(
    "other",
    [
        ["--out", "x"],
        ["--report", "x"],
        ["--impls", "flash_mla"],
        ["--shapes", "B8_1k_q1_h16"],
        ["--random", "3"],
        ["--seed", "3"],
        ["--serving"],
        ["--step"],
        ["--layers", "3"],
    ],
    ids=" ".join,
)
def test_planning_and_floor_refuse_what_they_would_ignore(
    mode: str, other: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.parse([mode, "--replays", "3"]).replays == 3
    with pytest.raises(SystemExit):
        bench.parse([mode, *other])
    message = f"{mode} prints a table of its own: expected no {other[0]}"
    assert message in capsys.readouterr().err


def test_planning_and_floor_are_not_asked_for_together(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--planning", "--floor"])
    assert "--planning prints a table of its own: expected no --floor" in capsys.readouterr().err


def test_a_wrong_output_of_a_peer_fails_too() -> None:
    shape = SHAPES["B8_1k_q1_h16"]
    assert bench.exit_code([Row(shape, "mla_decode", us=1.0), Row(shape, "flash_mla", us=1.0)]) == 0
    assert bench.exit_code([Row(shape, "flash_mla", us=1.0, error="wrong output")]) == 1
    assert bench.exit_code([Row(shape, "flash_mla", error="not installed")]) == 0
    assert bench.exit_code([Row(shape, "mla_decode", error="did not run")]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "--layers", "0"], "--layers: expected at least 1, got 0"),
        (["--replays", "0"], "--replays: expected at least 1, got 0"),
        (["--random", "-3"], "--random: expected at least 0, got -3"),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else None,
)
def test_numbers_are_checked(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--out", "no/such/rows.json"], ["--out", "."], ["--report", "f"], ["--report", "f/below"]],
    ids=" ".join,
)
def test_files_that_cannot_be_written_are_refused_before_measuring(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f").touch()
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert f"{arguments[0]}: expected a f" in capsys.readouterr().err
    assert bench.parse(["--out", "new.json", "--report", "new/folder"]).out == Path("new.json")


def test_one_file_that_cannot_be_written_does_not_lose_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "title", lambda: "a GPU")
    rows = [Row(SHAPES["B8_1k_q1_h16"], "mla_decode", us=4.0, rel_err=2e-3)]
    assert not bench.write_files(rows, tmp_path / "gone" / "rows.json", tmp_path / "report")
    assert (tmp_path / "report" / "report.md").exists()
    assert "bench: --out: " in capsys.readouterr().err


def test_names_of_a_file_that_stand_for_two_shapes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def entry(name: str, length: int = 40) -> dict[str, Any]:
        return {"name": name, "seq_lens": [length], "new_tokens": 1, "num_heads": 16}

    def chosen(*entries: dict[str, Any]) -> list[Shape]:
        file = tmp_path / "shapes.json"
        file.write_text(json.dumps(entries), encoding="utf-8")
        given = ["--file", str(file), "--shapes", "B8_1k_q1_h16"]
        return list(bench.parse(given).chosen)

    assert [shape.name for shape in chosen(entry("a"), entry("b"))] == ["B8_1k_q1_h16", "a", "b"]
    for name, entries in (
        ("a", [entry("a"), entry("b"), entry("a", 90)]),
        ("B8_1k_q1_h16", [entry("B8_1k_q1_h16")]),
    ):
        with pytest.raises(SystemExit):
            chosen(*entries)
        message = f"--file: expected names of one shape each, got {name!r} again"
        assert message in capsys.readouterr().err


def test_a_machine_without_git_does_not_know_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench.commit() == "unknown"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_that_goes_to_a_file_is_there_although_a_terminal_shows_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "stderr", terminal)
    shapes = list(SHAPES.values())[:2]
    for shape in bench.with_progress(shapes):
        print(shape.name)
    assert file.getvalue().splitlines() == [shape.name for shape in shapes]
    assert "shapes" in terminal.getvalue()


def test_the_summary_compares_with_the_faster_peer() -> None:
    def row(shape: str, impl: str, us: float, error: str = "") -> Row:
        return Row(SHAPES[shape], impl, us=us, error=error)

    bound = ("B8_1k_q1_h16", "B1_64k_q1_h16")  # by memory
    rows = [row(shape, "mla_decode", 10.0) for shape in (*bound, "B128_8k_q2_h128", "imb4_q4_h16")]
    rows += [row(bound[0], "flash_mla", 20.0), row(bound[0], "flashinfer_fa3", 40.0)]
    rows += [row(bound[1], "flash_mla", 5.0), row(bound[1], "flashinfer_fa3", 1.0, "wrong output")]
    rows += [row("B128_8k_q2_h128", "flash_mla", 80.0)]  # imb4 has no peer
    whole, memory = bench.summary(rows).splitlines()
    assert whole.startswith("all, 3 shapes: the faster peer takes 2.00 times")
    assert memory.startswith("memory-bound, 2 shapes: the faster peer takes 1.00 times")
    assert memory.endswith("at least 0.50 (B1_64k_q1_h16)")
    assert bench.summary(rows[:4]) == ""
