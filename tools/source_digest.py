"""The digest that ties a results file to what the kernels that it measured were built from."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import build, fetch_thunderkittens  # noqa: E402

FOLDERS = ("megakernel", "instructions", "scheduler", "python/bindings")
SUFFIXES = {".h", ".cuh", ".cpp", ".cu", ".json"}  # sources and cost models


def build_settings() -> dict[str, str]:
    """What else decides the machine code: compilers' flags, and the headers from elsewhere."""
    return {
        "nvcc": build.NVCC_FLAGS,
        "cxx": build.CXX_FLAGS,
        "thunderkittens": fetch_thunderkittens.SHA256,
    }


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
    """Return the sha256 over names and contents of the covered files, and the build's settings."""
    digest = hashlib.sha256()
    for name, setting in build_settings().items():
        digest.update(f"{name}\0{len(setting)}\0{setting}".encode())
    for path in digested_files(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


if __name__ == "__main__":
    print(source_digest())
