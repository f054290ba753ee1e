"""Builds the extension modules with ninja.

    python tools/build.py [--out DIR] [--no-kernels] [--allow-spills]

``_scheduler`` is plain C++17 and builds anywhere. ``_kernels`` needs nvcc (from ``CUDA_HOME``,
``PATH``, or the registry's wheels) and the ThunderKittens headers; without nvcc it is left out,
which is said loudly. A register spill in a kernel fails the build. The kernels of demos, benchmarks
and tests are built beside their sources, but not for an installed package.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import environment, fetch_thunderkittens  # noqa: E402

BUILD = ROOT / "build"
PACKAGE = ROOT / "python" / "mla_decode"
# CUDA modules that no user of the package needs, and their sources.
BESIDE_THE_PACKAGE = {
    "demos/_rms_norm": "demos/*.cu",
    "benchmarks/_stream": "benchmarks/*.cu",
    "tests/_hanging": "tests/hanging.cu",
    "tests/_late_write": "tests/late_write.cu",
}
NVCC_FLAGS = (
    "-gencode=arch=compute_90a,code=sm_90a -std=c++20 -O3 -lineinfo -DKITTENS_HOPPER "
    "--expt-relaxed-constexpr --expt-extended-lambda -Xptxas -v "
    "-Xcompiler -fPIC,-fvisibility=hidden"
)
# (-O3 makes the planner 4% slower.)
CXX_FLAGS = "-std=c++17 -O2 -fPIC -fvisibility=hidden -Wall -Wextra"

RULES = """\
ninja_required_version = 1.10
builddir = {build}

rule cxx
  command = {cxx} {cxx_flags} -MMD -MF $out.d $includes -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = cxx $in

rule link
  command = {cxx} -shared -Wl,--gc-sections $in -o $out
  description = link $out

# -Xptxas -v reports on stderr: kept beside the object, shown when the compilation fails.
rule nvcc
  command = {nvcc} {nvcc_flags} -MMD -MF $out.d $includes -c $in -o $out > $out.log 2>&1 $
      || (cat $out.log; exit 1)
  depfile = $out.d
  deps = gcc
  description = nvcc $in

rule ptxas
  command = {python} {root}/tools/ptxas_report.py {allow_spills} --out $out $in
  description = ptxas report

rule nvcc_link
  command = {nvcc} -shared -cudart static {nvcc_lib} $in -o $out
  description = link $out
"""


class BuildError(RuntimeError):
    """The build cannot start or did not succeed."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler and, where it does not find them itself, its libraries."""

    nvcc: Path
    lib: Path | None = None


def find_nvcc() -> Toolkit | None:
    """Return nvcc of ``CUDA_HOME``, else of ``PATH``, else of the wheels installed here."""
    if home := os.environ.get("CUDA_HOME"):
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.exists():
            raise BuildError(f"CUDA_HOME: expected an nvcc at {nvcc}, there is none")
        return Toolkit(nvcc)
    if found := shutil.which("nvcc"):
        return Toolkit(Path(found))
    return nvcc_from_wheels()


def nvcc_from_wheels() -> Toolkit | None:
    """Return nvcc of the nvidia-cuda-nvcc wheel of this interpreter, if it is there."""
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"
    nvcc = wheel / "bin" / "nvcc"
    return Toolkit(nvcc, wheel / "lib") if nvcc.exists() else None


def install_nvcc() -> Toolkit | None:
    """Install the nvcc wheels into ``.venv`` (only when running from there)."""
    if Path(sys.prefix) != environment.VENV:
        return None
    print("build: no nvcc on this machine; taking it from the registry", flush=True)
    try:
        environment.install("nvcc")
    except environment.InstallError as error:
        print(f"build: {error}", file=sys.stderr)
    return nvcc_from_wheels()


def sources_of(root: Path, patterns: list[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in root.glob(pattern))


def compile_edges(
    rule: str, root: Path, sources: list[Path], folder: Path
) -> tuple[str, list[str]]:
    """Return one ninja edge per source below ``root``, and the objects."""
    lines, objects = [], []
    for source in sources:
        name = f"{folder}/{source.relative_to(root)}.o"
        log = f" | {name}.log" if rule == "nvcc" else ""
        lines.append(f"build {name}{log}: {rule} {source}\n  includes = $includes_{rule}\n")
        objects.append(name)
    return "".join(lines), objects


def ninja_text(
    out: Path,
    folder: Path,
    toolkit: Toolkit | None,
    kittens: Path | None,
    allow_spills: bool,
    root: Path = ROOT,
    flags: str = "",
) -> str:
    """Return build.ninja for the sources that are below ``root`` now."""
    import pybind11

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    python_include = sysconfig.get_path("include")
    includes = f"{flags} -I{root} -isystem {pybind11.get_include()} -isystem {python_include}"
    text = RULES.format(
        build=folder,
        root=ROOT,
        python=sys.executable,
        cxx=os.environ.get("CXX", "g++"),
        cxx_flags=CXX_FLAGS,
        nvcc=toolkit.nvcc if toolkit else "nvcc",
        nvcc_flags=NVCC_FLAGS,
        nvcc_lib=f"-L{toolkit.lib}" if toolkit and toolkit.lib else "",
        allow_spills="--allow-spills" if allow_spills else "",
    )
    text += f"\nincludes_cxx = {includes}\nincludes_nvcc = {includes} -I{kittens}\n\n"

    scheduler = sources_of(root, ["scheduler/*.cpp", "python/bindings/*.cpp"])
    objects_folder = folder / f"objects{suffix.removesuffix('.so')}"
    if scheduler:
        lines, objects = compile_edges("cxx", root, scheduler, objects_folder)
        text += f"{lines}build {out}/_scheduler{suffix}: link {' '.join(objects)}\n\n"
    kernels = sources_of(root, ["python/bindings/*.cu"])
    modules = {out / f"_kernels{suffix}": kernels}
    if out == PACKAGE:
        for module, sources in BESIDE_THE_PACKAGE.items():
            modules[ROOT / f"{module}{suffix}"] = sources_of(root, [sources])
    if kernels and toolkit and kittens:
        report, logs = folder / "ptxas.txt", []
        for module, sources in modules.items():
            lines, objects = compile_edges("nvcc", root, sources, objects_folder)
            logs += [f"{name}.log" for name in objects]
            if sources is kernels:  # what the planner's checks are made of
                objects.append(f"{objects_folder}/scheduler/batch.cpp.o")
            text += f"{lines}build {module}: nvcc_link {' '.join(objects)} || {report}\n"
        text += f"build {report}: ptxas {' '.join(logs)} | {ROOT}/tools/ptxas_report.py\n"
    return text


def run_ninja(folder: Path, text: str, targets: Sequence[Path] = ()) -> None:
    """Build what the text says, or those targets of it, with objects in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once: the second waits
        (folder / "build.ninja").write_text(text)
        answer = subprocess.run(
            [sys.executable, "-m", "ninja", "-f", str(folder / "build.ninja"), *map(str, targets)],
            cwd=ROOT,
            env={**os.environ, "NINJA_STATUS": "[%f/%t] "},
        )
    if answer.returncode != 0:
        raise BuildError("a step failed, see above")


def build_kernels(root: Path, folder: Path, flags: str) -> Path:
    """Build ``_kernels`` of the sources below ``root``, all in ``folder``; return the module.

    Spills are reported, and do not fail it.
    """
    toolkit = find_nvcc() or install_nvcc()
    if toolkit is None:
        raise BuildError("no nvcc: set CUDA_HOME or put nvcc 13 on PATH")
    kittens = fetch_thunderkittens.include_folder()
    text = ninja_text(folder, folder, toolkit, kittens, True, root, flags)
    module = folder / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    run_ninja(folder, text, [module, folder / "ptxas.txt"])
    return module


def build(
    out: Path, *, folder: Path = BUILD, kernels: bool = True, allow_spills: bool = False
) -> list[str]:
    """Build into ``out``, objects in ``folder``; return the names of the modules that are there."""
    started = time.monotonic()
    toolkit = (find_nvcc() or install_nvcc()) if kernels else None
    kittens = fetch_thunderkittens.include_folder() if toolkit else None
    out.mkdir(parents=True, exist_ok=True)
    run_ninja(folder, ninja_text(out, folder, toolkit, kittens, allow_spills))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if kernels and toolkit is None:  # one of an earlier build would not fit these sources
        (out / f"_kernels{suffix}").unlink(missing_ok=True)
        if out == PACKAGE:
            for module in BESIDE_THE_PACKAGE:
                (ROOT / f"{module}{suffix}").unlink(missing_ok=True)
    built = [name for name in ("_scheduler", "_kernels") if (out / f"{name}{suffix}").exists()]
    print(f"build: {' and '.join(built) or 'nothing'} in {time.monotonic() - started:.1f} s")
    if kernels and toolkit is None:
        print(
            "build: ** NO NVCC: the kernels were not built. The scheduler and the CPU interpreter\n"
            "build: ** work; for the GPU set CUDA_HOME or put nvcc 13 on PATH and run make again.",
            file=sys.stderr,
        )
    return built


def main() -> int:
    parser = argparse.ArgumentParser(description="build the extension modules")
    parser.add_argument("--out", type=Path, default=PACKAGE, help="folder of the modules")
    parser.add_argument("--no-kernels", action="store_true", help="the scheduler only")
    parser.add_argument("--allow-spills", action="store_true", help="report spills, do not fail")
    arguments = parser.parse_args()
    try:
        build(
            arguments.out.resolve(),
            kernels=not arguments.no_kernels,
            allow_spills=arguments.allow_spills or bool(os.environ.get("ALLOW_SPILLS")),
        )
    except (BuildError, fetch_thunderkittens.FetchError) as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
