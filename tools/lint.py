"""Lint, format and types, each with the pinned tool. ``--fix`` rewrites what can be rewritten."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPP_FOLDERS = (
    "megakernel",
    "instructions",
    "scheduler",
    "python",
    "demos",
    "benchmarks",
    "tests",
)
CPP_SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}


def cpp_files() -> list[str]:
    """Return the C++ and CUDA sources, relative to the root."""
    return sorted(
        str(path.relative_to(ROOT))
        for folder in CPP_FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in CPP_SUFFIXES
    )


def steps(fix: bool) -> dict[str, list[str]]:
    """Return the commands by name."""
    clang_format = str(Path(sys.executable).parent / "clang-format")
    python = [sys.executable, "-m"]
    return {
        "ruff check": [*python, "ruff", "check", *(["--fix"] if fix else []), "."],
        "ruff format": [*python, "ruff", "format", *([] if fix else ["--check"]), "."],
        "mypy": [*python, "mypy"],
        "clang-format": [
            clang_format,
            *(["-i"] if fix else ["--dry-run", "-Werror"]),
            *cpp_files(),
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="ruff, mypy and clang-format")
    parser.add_argument("--fix", action="store_true")
    failed = []
    for name, command in steps(parser.parse_args().fix).items():
        print(f"lint: {name}", flush=True)
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            failed.append(name)
    if failed:
        print(f"lint: FAILED: {', '.join(failed)} (`make format` rewrites)", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
