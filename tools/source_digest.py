"""The digest that ties a results file to the sources it was measured with."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("megakernel", "instructions", "scheduler", "python/bindings")
SUFFIXES = {".h", ".cuh", ".cpp", ".cu", ".json"}  # sources and cost models


def digested_files(root: Path = ROOT) -> list[Path]:
    """Return the files that the digest covers, in its order."""
    return sorted(
        (
            path
            for folder in FOLDERS
            for path in (root / folder).rglob("*")
            if path.suffix in SUFFIXES
        ),
        key=lambda path: path.relative_to(root).as_posix(),
    )


def source_digest(root: Path = ROOT) -> str:
    """Return the sha256 over names and contents of the covered files."""
    digest = hashlib.sha256()
    for path in digested_files(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


if __name__ == "__main__":
    print(source_digest())
