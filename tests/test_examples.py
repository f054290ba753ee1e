"""The worked examples run, check themselves, and say that they passed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "demos" / "examples").glob("*.py"))
TIMEOUT_S = 240


def run(example: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(example)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "python"), **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_there_is_one_for_every_use_that_wants_more_than_the_readme() -> None:
    assert [example.stem for example in EXAMPLES] == [
        "context_parallel",
        "cuda_graph_loop",
        "torch_compile",
    ]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_passes_without_a_gpu(example: Path) -> None:
    answer = run(example, CUDA_VISIBLE_DEVICES="")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.splitlines()[-1].endswith("passed")


@pytest.mark.gpu
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_passes_on_the_gpu(example: Path) -> None:
    answer = run(example)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.splitlines()[-1].endswith("passed")
