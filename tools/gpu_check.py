"""GPU tests and benchmark; writes benchmarks/results/<device>.json.

    python tools/gpu_check.py [--pytest ARGS] [--replays N]

The file is written even when something failed, and names the tests and the benchmark's wrong
outputs, whose figures it leaves out; the exit status is then 1. A copy goes to the folder that OUT
names, if it is set.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from benchmarks import bench  # noqa: E402
from benchmarks.implementations import IMPLEMENTATIONS  # noqa: E402
from benchmarks.measure import REPLAYS, Row  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402
from tools.results import FOLDER, ResultsError, install  # noqa: E402
from tools.source_digest import source_digest  # noqa: E402

CORRECTNESS_LOG = ROOT / "build" / "correctness.jsonl"


def run_tests(extra: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Run ``pytest -m gpu``; return the names of tests that failed, and the correctness rows."""
    CORRECTNESS_LOG.parent.mkdir(exist_ok=True)
    report = CORRECTNESS_LOG.with_name("gpu-tests.xml")
    for file in (CORRECTNESS_LOG, report):
        file.unlink(missing_ok=True)
    status = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", *extra],
        cwd=ROOT,
        env={**os.environ, "MLA_DECODE_CORRECTNESS": str(CORRECTNESS_LOG)},
    ).returncode
    failed = failed_tests(report) if report.exists() else []
    if status and not failed:
        failed = [f"pytest ended with status {status}"]
    lines = CORRECTNESS_LOG.read_text().splitlines() if CORRECTNESS_LOG.exists() else []
    return failed, [finite(json.loads(line)) for line in lines]


def failed_tests(report: Path) -> list[str]:
    """Return the tests that failed, or could not run, by pytest's JUnit report."""
    return [
        f"{case.get('classname')}::{case.get('name')}"
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: an error that is not finite becomes a huge number."""
    return {
        name: 1e30 if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def results_of(
    digest: str, failed: list[str], correctness: list[dict[str, Any]], rows: list[Row]
) -> dict[str, Any]:
    """Return what the file holds; a row with an error has no figure there."""
    return {
        "device": torch.cuda.get_device_name(),
        "commit": bench.commit(),
        "source_digest": digest,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "floor": rows[0].floor.as_json(),
        "failed_tests": failed,
        "correctness": correctness,
        "benchmark": [row.as_json() for row in bench.with_figures(rows)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="GPU tests, benchmark, results file")
    parser.add_argument("--pytest", default="", metavar="ARGS", help="further arguments of pytest")
    parser.add_argument("--replays", type=int, default=REPLAYS)
    arguments = parser.parse_args()
    if arguments.replays < 1:
        parser.error(f"--replays: expected at least 1, got {arguments.replays}")
    if not torch.cuda.is_available():
        print(f"gpu-check: no CUDA GPU (torch {torch.__version__})", file=sys.stderr)
        return 2
    digest = source_digest()  # before, so that an edit during the run does not count as measured
    failed, correctness = run_tests(shlex.split(arguments.pytest))
    rows = bench.run(list(SHAPES.values()), list(IMPLEMENTATIONS), arguments.replays)
    failed = failed + [f"benchmark: {failure}" for failure in bench.failures(rows)]
    results = results_of(digest, failed, correctness, rows)
    failures = [*failed]
    failures += [f"correctness: {row['case']}" for row in correctness if not row["passed"]]
    failures += [] if correctness else ["no correctness row was recorded"]
    try:
        path = install(results, FOLDER)
        print(f"gpu-check: wrote {path.relative_to(ROOT)}")
        if out := os.environ.get("OUT"):
            shutil.copy(path, out)
    except ResultsError as error:
        failures.append(str(error))
    print("gpu-check: " + ("; ".join(failures) if failures else "all passed"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
