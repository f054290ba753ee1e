"""Writes the measured table of README.md, and its picture, from the newest file of results.

python tools/readme_table.py [--check]

The table stands between the markers ``<!-- results -->`` and ``<!-- /results -->``; the picture is
docs/figures/measured.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measure import Row  # noqa: E402
from benchmarks.report import write_multiples  # noqa: E402
from benchmarks.shapes import ASSUMED, SHAPES, Floor  # noqa: E402
from tools.results import FOLDER, result_files  # noqa: E402

README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "figures" / "measured.svg"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
OURS = "mla_decode"
PEERS = {"flash_mla": "FlashMLA", "flashinfer_fa3": "FlashInfer"}
NOT_MEASURED = "Not measured yet: `make gpu-check` on a Hopper GPU, then `tools/readme_table.py`."


class TableError(ValueError):
    """README has no place for the table, or not the table that belongs there."""


def newest(folder: Path = FOLDER) -> dict[str, Any] | None:
    """Return the results of the latest date; None if there are none."""
    records: list[dict[str, Any]] = [json.loads(path.read_text()) for path in result_files(folder)]
    return max(records, key=lambda record: record["date"], default=None)


def floor_of(record: dict[str, Any]) -> Floor:
    """Return the floor that was measured with the results; older files have none."""
    return Floor(**record["floor"]) if "floor" in record else ASSUMED


def floor_sentence(record: dict[str, Any]) -> str:
    """Say what the column of multiples counts with."""
    if "floor" in record:
        return f"Floor: {floor_of(record)}."
    return (
        "Floor: as an H200 once gave it, within 4% of 1.6 us + bytes / 4.6 TB/s, or FLOP / 790 "
        "TFLOP/s."
    )


def rate(row: dict[str, Any], floor: Floor) -> str:
    """Return what bounds the shape: GB/s of a stream, TFLOP/s of arithmetic."""
    shape = SHAPES.get(row["shape"])
    if shape is None or floor.is_memory_bound(shape):
        return f"{row['gbps']:.0f} GB/s"
    return f"{row['tflops']:.0f} TFLOP/s"


def origin(record: dict[str, Any]) -> str:
    """Say where and of what the results were measured."""
    return f"{record['device']}, {record['date']}, commit {record['commit'][:12]}"


def multiples(record: dict[str, Any]) -> str:
    """Return what the picture shows: how many times the floor each implementation takes."""
    return "; ".join(
        f"{row['shape']} {row['impl']} {row['us'] / row['floor_us']:.2f}"
        for row in record["benchmark"]
    )


def write_picture(record: dict[str, Any], path: Path = PICTURE) -> None:
    """Draw the multiples of the floor."""
    floor = floor_of(record)
    rows = [
        Row(SHAPES[row["shape"]], row["impl"], row["us"], floor=floor)
        for row in record["benchmark"]
        if row["shape"] in SHAPES
    ]
    write_multiples(path, rows, origin(record), multiples(record))


def table(record: dict[str, Any] | None) -> str:
    """Return what stands between the markers."""
    if record is None:
        return NOT_MEASURED
    by_impl: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record["benchmark"]:
        by_impl.setdefault(row["impl"], {})[row["shape"]] = row
    header = ["shape", "us", "rate", "x floor", *(f"{name}, us" for name in PEERS.values())]
    lines = [
        f"{origin(record)}, torch {record['torch']}, CUDA {record['cuda']}. In brackets: how many "
        f"times as long as ours. {floor_sentence(record)}",
        "",
        f"| {' | '.join(header)} |",
        f"|---|{'---:|' * (len(header) - 1)}",
    ]
    floor = floor_of(record)
    for shape, row in by_impl.get(OURS, {}).items():
        cells = [shape, f"{row['us']:.1f}", rate(row, floor), f"{row['us'] / row['floor_us']:.2f}"]
        for impl in PEERS:
            peer = by_impl.get(impl, {}).get(shape)
            cells.append(f"{peer['us']:.1f} ({peer['us'] / row['us']:.2f})" if peer else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def is_current(record: dict[str, Any] | None, path: Path = PICTURE) -> bool:
    """Whether the picture says of itself that it shows this record."""
    if record is None:
        return True
    picture = path.read_text(encoding="utf-8") if path.exists() else ""
    return origin(record) in picture and multiples(record) in picture


def rewritten(readme: str, text: str) -> str:
    """Return ``readme`` with ``text`` between its markers."""
    if (
        readme.count(BEGIN) != 1
        or readme.count(END) != 1
        or readme.index(END) < readme.index(BEGIN)
    ):
        raise TableError(f"README.md: expected one {BEGIN} and, after it, one {END}")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="write README's table of results")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if it differs")
    arguments = parser.parse_args(argv)
    readme = README.read_text(encoding="utf-8")
    record = newest()
    wanted = rewritten(readme, table(record))
    if arguments.check:
        current = wanted == readme and is_current(record)
        print("README's table and picture are " + ("current" if current else "stale"))
        return 0 if current else 1
    README.write_text(wanted, encoding="utf-8")
    if record is not None:
        write_picture(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
