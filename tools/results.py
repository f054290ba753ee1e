"""The results files: what they hold and what makes one valid.

    python -m tools.results --pending REASON
    python -m tools.results --install FILE

The first says why no results exist for the sources as they are now, in
benchmarks/results/pending.json. The second takes a file that `make gpu-check` wrote on another
machine: what it replaces goes to benchmarks/results/history/.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, Floor, Shape
from tools.source_digest import source_digest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
PENDING = "pending.json"
HISTORY = "history"
NOISE = 1.03  # a shape that takes longer than this many times its last time has lost
AGREEMENT = 0.01  # how far a rate may be from that of the time: they are rounded
KEPT_CASES = 0.9  # of the correctness rows before; fewer are tests that did not run

NUMBER = (int, float)
HEAD = {
    "device": str,
    "commit": str,
    "source_digest": str,
    "date": str,
    "torch": str,
    "cuda": str,
    "correctness": list,
    "benchmark": list,
}
LATER = {"floor": dict, "failed_tests": list}
FLOOR = {"launch_us": NUMBER, "bytes_per_us": NUMBER, "flop_per_us": NUMBER, "measured": bool}
CORRECTNESS = {"case": str, "rel_err": NUMBER, "lse_max_abs_err": NUMBER, "passed": bool}
BENCHMARK = {
    "shape": str,
    "impl": str,
    "us": NUMBER,
    "gbps": NUMBER,
    "tflops": NUMBER,
    "floor_us": NUMBER,
    "rel_err": NUMBER,
}
IMPLS = ("mla_decode", "flash_mla", "flashinfer_fa3")


class ResultsError(ValueError):
    """A results file is malformed, stale, or records a failure."""


def slug(device: str) -> str:
    """Return a device's name as a file name: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def result_files(folder: Path = FOLDER) -> list[Path]:
    """Return the results of all devices."""
    return sorted(path for path in folder.glob("*.json") if path.name != PENDING)


def check_fields(record: Any, fields: dict[str, Any], where: str) -> None:
    if not isinstance(record, dict) or set(record) != set(fields):
        raise ResultsError(f"{where}: expected the fields {sorted(fields)}, got {sorted(record)}")
    for name, kind in fields.items():
        value = record[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ResultsError(f"{where}: {name} has the type {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ResultsError(f"{where}: {name} is {value}")


def check_schema(results: Any) -> None:
    """Raise ResultsError unless ``results`` has exactly the documented fields.

    Older files have no ``floor``: their rows count with streams that an H200 once gave. Nor have
    they ``failed_tests``.
    """
    later = {name: kind for name, kind in LATER.items() if name in results}
    check_fields(results, HEAD | later, "results")
    if "floor" in results:
        check_fields(results["floor"], FLOOR, "floor")
    for i, row in enumerate(results["correctness"]):
        check_fields(row, CORRECTNESS, f"correctness[{i}]")
    for i, row in enumerate(results["benchmark"]):
        check_fields(row, BENCHMARK, f"benchmark[{i}]")
        if row["impl"] not in IMPLS:
            raise ResultsError(f"benchmark[{i}]: impl {row['impl']!r} is none of {IMPLS}")


def check_digests(digest: str, folder: Path = FOLDER) -> str:
    """Check that every device's results were measured with the sources of ``digest``.

    Returns a warning, empty if all match. ``pending.json`` (``{"source_digest", "reason"}``) with
    this digest turns the error into the warning.
    """
    files = result_files(folder)
    stale = [path.name for path in files if json.loads(path.read_text())["source_digest"] != digest]
    if files and not stale:
        return ""
    problem = (
        f"{', '.join(stale)}: measured with other sources" if files else "no device has results"
    )
    pending_path = folder / PENDING
    if pending_path.exists():
        pending = json.loads(pending_path.read_text())
        if pending.get("source_digest") == digest and str(pending.get("reason", "")).strip():
            return f"{problem}; pending: {pending['reason']}"
        problem += f" ({PENDING} names another digest, or no reason)"
    raise ResultsError(
        f"{problem}. Run `make gpu-check` on the device, or say why not: "
        f"python -m tools.results --pending REASON (the digest is {digest})"
    )


def write_pending(reason: str, digest: str, folder: Path = FOLDER) -> Path:
    """Say why no device has results for the sources of ``digest``; return the file."""
    if not reason.strip():
        raise ResultsError("a reason is needed")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PENDING
    path.write_text(
        json.dumps({"source_digest": digest, "reason": reason.strip()}, indent=1) + "\n"
    )
    return path


def install(results: dict[str, Any], folder: Path = FOLDER, digest: str = "") -> Path:
    """Write ``results`` as those of their device; return the file.

    Those that were measured with other sources are kept, numbered, in ``history/<device>/``. Why
    there are none is forgotten if these were measured with the sources of ``digest``, which are
    those that are here if it is not given.
    """
    check_schema(results)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(results['device'])}.json"
    if path.exists():
        before = json.loads(path.read_text())
        if before["source_digest"] != results["source_digest"]:
            past = history(path)
            number = max((int(file.name.split("-")[0]) for file in past), default=0) + 1
            name = f"{number:04}-{before['commit'][:12]}.json"
            kept = folder / HISTORY / path.stem / name
            kept.parent.mkdir(parents=True, exist_ok=True)
            path.rename(kept)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if results["source_digest"] == (digest or source_digest()):
        (folder / PENDING).unlink(missing_ok=True)
    return path


def history(path: Path) -> list[Path]:
    """Return the results that a device's file has replaced, the oldest first."""
    return sorted((path.parent / HISTORY / path.stem).glob("*.json"))


def losses(
    new: list[dict[str, Any]], old: list[dict[str, Any]], impl: str = IMPLS[0]
) -> dict[str, float]:
    """Return how many times as long the shapes take that got slower by more than noise."""
    before = {row["shape"]: row["us"] for row in old if row["impl"] == impl}
    ratios = {
        row["shape"]: row["us"] / before[row["shape"]]
        for row in new
        if row["impl"] == impl and row["shape"] in before
    }
    return {shape: ratio for shape, ratio in ratios.items() if ratio > NOISE}


def absurd(results: dict[str, Any]) -> list[str]:
    """Return the figures that are none: not positive, or rates that are not those of the time.

    Floors are compared only with one that was measured in the same run.
    """
    floor = Floor(**results["floor"]) if "floor" in results else None
    problems = []
    for row in results["benchmark"]:
        where = f"{row['shape']}, {row['impl']}"
        if row["shape"] not in SHAPES:
            problems.append(f"{where}: expected a shape of benchmarks/shapes.py")
            continue
        if row["us"] <= 0:
            problems.append(f"{where}: us: expected more than 0, got {row['us']}")
            continue
        for name, value in _implied(SHAPES[row["shape"]], row["us"], floor).items():
            if not math.isclose(row[name], value, rel_tol=AGREEMENT):
                problems.append(f"{where}: {name}: expected {value:.2f}, got {row[name]}")
    return problems


def _implied(shape: Shape, us: float, floor: Floor | None) -> dict[str, float]:
    """What a row must say beside its time."""
    implied = {"gbps": shape.bytes / us / 1e3, "tflops": shape.flop / us / 1e6}
    return implied | ({"floor_us": floor.us(shape)} if floor else {})


def missing(results: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Return what results lack that those ``before`` them had."""
    rows, old_rows = (
        {(row["shape"], row["impl"]) for row in record["benchmark"]} for record in (results, before)
    )
    impls = {impl for _, impl in old_rows}
    problems = [
        f"{shape}: expected a row of {impl}, as before"
        for shape in SHAPES
        for impl in sorted(impls)
        if (shape, impl) not in rows
    ]
    cases, least = len(results["correctness"]), KEPT_CASES * len(before["correctness"])
    if cases < least:
        problems.append(f"correctness: expected at least {least:.0f} rows, got {cases}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="results of a GPU, or why there are none")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--pending", metavar="REASON")
    chosen.add_argument("--install", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    try:
        if arguments.install:
            path = install(json.loads(arguments.install.read_text()))
        else:
            path = write_pending(arguments.pending, source_digest())
    except (OSError, ValueError) as error:
        print(f"results: {error}", file=sys.stderr)
        return 1
    print(f"results: wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
