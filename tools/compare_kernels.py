"""Compare kernels of several versions of the sources, side by side on a GPU.

    python tools/compare_kernels.py HEAD~1 . --shapes B1_64k_q1_h16 B8_1k_q1_h16
    python tools/compare_kernels.py main . ../other --random 24 --seed 3

A version is a git revision, a folder with sources, or a module that ``--build-only`` built, for
machines without git. The first one is what the others are compared with. All run the plans of the
scheduler that is here, called by the Python that is here, so they go back as far as the instruction
format and the bindings are the same. Each is built once, in ``build/compare/``, in a minute or two.

Differences of half a percent are in the noise of where a module happens to lie: name the first
version twice to see how large that is. (Short batches with clusters differ by up to 4%.)
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import mla_decode  # noqa: E402
from mla_decode import native  # noqa: E402

from benchmarks import choice  # noqa: E402
from benchmarks.case import Case  # noqa: E402
from benchmarks.implementations import Prepared, mla_decode_by  # noqa: E402
from benchmarks.shapes import SHAPES, Shape  # noqa: E402
from tools import build  # noqa: E402
from tools.side_by_side import Gain, note_gains, times_of  # noqa: E402

FOLDER = build.BUILD / "compare"
SOURCES = ("megakernel", "instructions", "scheduler", "python/bindings")
# pybind11 registers a C++ type once for all modules that share its internals. Each version has
# internals of its own.
INTERNALS = "-DPYBIND11_INTERNALS_VERSION={}"
FIRST_INTERNALS = 1000


def sources_of(version: str) -> Path:
    """Return the folder with the sources of a version: itself, or what git has, unpacked."""
    if (Path(version) / SOURCES[0]).is_dir():
        return Path(version).resolve()
    answer = subprocess.run(
        ["git", "archive", version, *SOURCES], cwd=ROOT, capture_output=True, check=False
    )
    if answer.returncode != 0:
        raise ValueError(
            f"{version}: expected a folder with {SOURCES[0]}/, a built module, or a git revision: "
            f"{answer.stderr.decode().strip()}"
        )
    commit = subprocess.check_output(["git", "rev-parse", version], cwd=ROOT, text=True).strip()
    folder = FOLDER / f"sources-{commit[:12]}"
    with tarfile.open(fileobj=io.BytesIO(answer.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def module_of(version: str, index: int) -> Path:
    """Return the built module of a version, the ``index``-th one, building it where need be."""
    if version.endswith(".so"):
        return Path(version).resolve()
    sources = sources_of(version)
    place = hashlib.sha256(str(sources).encode()).hexdigest()[:12]
    internals = INTERNALS.format(FIRST_INTERNALS + index)
    return build.build_kernels(sources, FOLDER / f"{index}-{place}", internals)


def load(path: Path, index: int) -> ModuleType:
    """Load a module beside those of other indices; ImportError if it cannot be loaded."""
    # pybind11 gives back what it has loaded by the same name.
    spec = importlib.util.spec_from_file_location(f"version{index}._kernels", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: no module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use(kernels: ModuleType) -> None:
    """Let the package launch these kernels from now on."""
    native._kernels = kernels
    native._layouts.clear()
    mla_decode.release_caches()


def prepare(kernels: ModuleType, plan: mla_decode.Plan, case: Case) -> Prepared:
    """Prepare a case to be captured next; what was captured stays what it is."""
    use(kernels)
    prepared = mla_decode_by(plan, case)

    def synchronize() -> None:
        use(kernels)
        prepared.synchronize()

    return Prepared(prepared.call, synchronize=synchronize)


def compare(shapes: list[Shape], versions: dict[str, ModuleType], replays: int) -> dict[str, Gain]:
    """Time each batch under all versions; print a line for each and return the gains."""
    base = next(iter(versions))
    gains = {name: Gain() for name in versions if name != base}
    for shape in shapes:
        new_tokens = list(shape.tokens) if shape.is_mixed else shape.new_tokens
        plan = mla_decode.plan(
            list(shape.seq_lens), shape.num_heads, new_tokens, batch_invariant=shape.batch_invariant
        )
        times: dict[str, list[float]] = {name: [] for name in versions}
        # Half of the replays in the other order: whose turn it is does not count.
        for order in (list(versions), list(reversed(versions))):
            ready: dict[str, Callable[[Case], Prepared]] = {
                name: partial(prepare, versions[name], plan) for name in order
            }
            for name, us in times_of(shape, ready, (replays + 1) // 2).items():
                times[name] += us
        note_gains(shape, times, base, gains)
    return gains


def names_of(versions: list[str]) -> list[str]:
    """Return a name for each version, its own if it has one."""
    return [
        version if version not in versions[:index] else f"{version} #{index}"
        for index, version in enumerate(versions)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="revision, folder or module")
    parser.add_argument("--build-only", action="store_true", help="print where the modules are")
    parser.add_argument("--replays", type=int, default=60)
    choice.add_options(parser)
    arguments = parser.parse_args(argv)
    shapes = choice.chosen(parser, arguments, SHAPES.values())
    try:
        paths = [module_of(version, i) for i, version in enumerate(arguments.versions)]
    except (ValueError, build.BuildError, build.fetch_thunderkittens.FetchError) as error:
        print(f"compare_kernels: {error}", file=sys.stderr)
        return 1
    names = names_of(arguments.versions)
    if arguments.build_only:
        for name, path in zip(names, paths, strict=True):
            print(f"{name}: {path}")
        return 0
    if not torch.cuda.is_available():
        print("compare_kernels: no CUDA GPU", file=sys.stderr)
        return 2
    try:
        modules = [load(path, i) for i, path in enumerate(paths)]
    except ImportError as error:  # built without --build-only, or for another Python
        print(f"compare_kernels: {error}", file=sys.stderr)
        return 1
    versions = dict(zip(names, modules, strict=True))
    for name, gain in compare(shapes, versions, arguments.replays).items():
        print(f"{name}: {gain}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
