"""Native parts of ``pip install .``: the build that make uses, into the wheel.

Without nvcc the wheel holds the scheduler and the CPU interpreter alone (``pip install -v`` shows
the message, ``python -m mla_decode doctor`` says it afterwards).
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from tools import build  # noqa: E402


class BuildNative(build_ext):
    """Runs tools/build.py in place of setuptools' own compiler."""

    def run(self) -> None:
        out = build.PACKAGE if self.inplace else Path(self.build_lib).resolve() / "mla_decode"
        folder = build.BUILD if self.inplace else Path(self.build_temp).resolve()
        # Spills are a gate of the project's own compiler (make), not of the user's.
        build.build(out, folder=folder, allow_spills=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "mla_decode").glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPackage(build_py):
    """Puts the cost models, which live beside the scheduler, inside the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "mla_decode" / "cost_models"
            target.mkdir(parents=True, exist_ok=True)
            for path in (ROOT / "scheduler" / "cost_models").glob("*.json"):
                shutil.copy(path, target)


setup(
    cmdclass={"build_ext": BuildNative, "build_py": BuildPackage},
    ext_modules=[Extension("mla_decode._scheduler", sources=[])],  # makes the wheel a platform one
)
