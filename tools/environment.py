"""Makes ``.venv`` and installs there what the chosen Python lacks.

    python tools/environment.py [--keep] GROUP ...

Run by the Python that the user chose. If that Python has torch, the environment inherits all its
packages and torch stays as it is; otherwise the pinned torch is installed. The chosen Python itself
is never changed. Groups and versions are those of ``[dependency-groups]`` in pyproject.toml.
Wheels in ``.whl/`` are tried first, for machines without a network.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STATE = VENV / "environment.json"
WHEELS = ROOT / ".whl"
EXACT_GROUPS = {"lint"}  # another version formats or complains otherwise
NO_DEPS_GROUPS = {"peers"}


class InstallError(RuntimeError):
    """A group of packages could not be installed."""


def pinned(group: str) -> list[str]:
    """Return the requirements of a group, as written in pyproject.toml."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        from pip._vendor import tomli as tomllib
    with (ROOT / "pyproject.toml").open("rb") as file:
        groups: dict[str, list[str]] = tomllib.load(file)["dependency-groups"]
    return groups[group]


def split_requirement(requirement: str) -> tuple[str, str]:
    """Return name and version of a requirement ``name==version; marker``."""
    match = re.fullmatch(r"([\w.-]+)==([\w.]+)(;.*)?", requirement)
    if match is None:
        raise ValueError(f"pyproject.toml: {requirement!r} is not pinned with ==")
    return match[1], match[2]


def has_package(python: str | Path, name: str, version: str | None = None) -> bool:
    """Whether an interpreter sees a distribution (of exactly that version, if one is given)."""
    if Path(python) == Path(sys.executable):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return False
        return version is None or found.split("+")[0] == version
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    found = answer.stdout.strip().split("+")[0]
    return answer.returncode == 0 and (version is None or found == version)


def caller_pip() -> list[str] | None:
    """Return the command of the chosen Python's pip, if it can install into another Python."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return None
    if (int(major), int(minor)) < (22, 3):  # the first with --python
        return None
    return [sys.executable, "-m", "pip", "--python", str(PYTHON)]


def make_venv() -> dict[str, Any]:
    """Make ``.venv`` anew from the running Python and return its state record."""
    inherits = has_package(sys.executable, "torch")
    print(
        f"environment: .venv from {sys.executable} "
        + ("(torch and all its packages are used as they are)" if inherits else "(no torch there)"),
        flush=True,
    )
    shutil.rmtree(VENV, ignore_errors=True)
    pip = caller_pip()
    without_pip = ["--without-pip"] if pip else []
    subprocess.run([sys.executable, "-m", "venv", *without_pip, str(VENV)], check=True)
    if inherits:
        # Not --system-site-packages: that shows the base Python's packages, and the chosen one
        # may be a virtual environment itself.
        paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        paths += site.getsitepackages()
        if site.ENABLE_USER_SITE:
            paths.append(site.getusersitepackages())
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        purelib = subprocess.check_output([str(PYTHON), "-c", query], text=True).strip()
        lines = "\n".join(
            f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(paths)
        )
        (Path(purelib) / "inherited.pth").write_text(lines + "\n")
    state = {
        "made_from": [sys.executable, sys.version],
        "pip": pip or [str(PYTHON), "-m", "pip"],
        "groups": {},
    }
    STATE.write_text(json.dumps(state, indent=1))
    if not inherits:
        install("torch")
    return state


def install(group: str) -> None:
    """Install what is missing of a group into ``.venv``; nothing if that was done before."""
    state = json.loads(STATE.read_text())
    requirements = pinned(group)
    if state["groups"].get(group) == requirements:
        return
    missing = []
    for requirement in requirements:
        name, version = split_requirement(requirement)
        if not has_package(PYTHON, name, version if group in EXACT_GROUPS else None):
            missing.append(requirement)
    if missing:
        print(f"environment: installing {', '.join(missing)}", flush=True)
        command = [*state["pip"], "install", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps"] if group in NO_DEPS_GROUPS else []
        if not run_pip(command, missing):
            raise InstallError(f"could not install {', '.join(missing)}")
    state["groups"][group] = requirements
    STATE.write_text(json.dumps(state, indent=1))


def run_pip(command: list[str], requirements: list[str]) -> bool:
    """Install from the carried wheels if they suffice, else from the registry."""
    if WHEELS.is_dir():
        carried = [*command, "--no-index", "--find-links", str(WHEELS), *requirements]
        if subprocess.run(carried, capture_output=True).returncode == 0:
            return True
    answer = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if answer.returncode != 0:
        print(answer.stderr.strip()[-2000:], file=sys.stderr)
    return answer.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="make .venv and install groups of packages")
    parser.add_argument("--keep", action="store_true", help="keep a .venv made from another Python")
    parser.add_argument("--optional", action="store_true", help="a failed install is a warning")
    parser.add_argument("groups", nargs="*")
    arguments = parser.parse_args()
    made_from = json.loads(STATE.read_text())["made_from"] if STATE.exists() else None
    usable = made_from is not None and PYTHON.exists()
    if not usable or (not arguments.keep and made_from != [sys.executable, sys.version]):
        make_venv()
    for group in arguments.groups:
        try:
            install(group)
        except InstallError as error:
            print(f"environment: {error}", file=sys.stderr)
            if not arguments.optional:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
