"""Brings the ThunderKittens headers into ``third_party/thunderkittens``.

The project publishes no package; its headers at commit 8613512d (2025-07-30) are inside the source
distribution below, under ``tk/``. Only ``tk/include`` and ``tk/LICENSE`` are unpacked, after the
archive's hash was checked; its setup script is not run. ``THUNDERKITTENS_ROOT`` names a checkout
to use instead.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import environment  # noqa: E402

PACKAGE = "st-attn==0.0.6"
ARCHIVE = "st_attn-0.0.6.tar.gz"
SHA256 = "d2b2d724716cdfd03c6afb2b40259fe5470b1889853fdffa1260453a87618b47"
PREFIX = "st_attn-0.0.6/tk/"
THIRD_PARTY = ROOT / "third_party" / "thunderkittens"


class FetchError(RuntimeError):
    """The headers cannot be had, or are not the ones expected."""


def include_folder() -> Path:
    """Return the folder that holds kittens.cuh, fetching it if needed."""
    if own := os.environ.get("THUNDERKITTENS_ROOT"):
        include = Path(own).resolve() / "include"
        if not (include / "kittens.cuh").exists():
            raise FetchError(
                f"THUNDERKITTENS_ROOT: expected {include}/kittens.cuh, it is not there"
            )
        return include
    stamp = THIRD_PARTY / "SHA256"  # of the archive that was unpacked
    if not stamp.exists() or stamp.read_text().strip() != SHA256:
        unpack(download())
    return THIRD_PARTY / "include"


def download() -> Path:
    """Return the archive: the one carried in ``.whl/``, else the registry's."""
    carried = environment.WHEELS / ARCHIVE
    if carried.exists():
        return carried
    if importlib.util.find_spec("unearth") is None:
        environment.install("thunderkittens")
    folder = ROOT / "build" / "download"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"build: fetching the ThunderKittens headers ({PACKAGE})", flush=True)
    command = [sys.executable, "-m", "unearth", "--no-binary", "--download", str(folder), PACKAGE]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0 or not (folder / ARCHIVE).exists():
        raise FetchError(
            f"{PACKAGE} could not be fetched; set THUNDERKITTENS_ROOT to a checkout, or put "
            f"{ARCHIVE} into .whl/\n{answer.stderr.strip()[-1000:]}"
        )
    return folder / ARCHIVE


def unpack(archive: Path) -> None:
    """Check the archive and replace ``third_party/thunderkittens`` with its headers."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise FetchError(f"{archive.name}: expected sha256 {SHA256}, got {digest}")
    THIRD_PARTY.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=THIRD_PARTY.parent) as folder:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.removeprefix(PREFIX)
                wanted = name == "LICENSE" or name.startswith("include/")
                source = tar.extractfile(member) if wanted and member.isfile() else None
                if source is None or ".." in Path(name).parts:
                    continue
                target = Path(folder) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())
        (Path(folder) / "SHA256").write_text(SHA256 + "\n")
        shutil.rmtree(THIRD_PARTY, ignore_errors=True)
        Path(folder).chmod(0o755)
        shutil.copytree(folder, THIRD_PARTY)


if __name__ == "__main__":
    try:
        print(include_folder())
    except FetchError as error:
        sys.exit(f"fetch: {error}")
