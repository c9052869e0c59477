"""The build step of the native libraries; everything else stands in pyproject.toml.

Setuptools calls CMake here, rather than scikit-build-core calling it, for two reasons. A machine
without compiler, CMake or onnxruntime's headers must still get an install (ONNX files run through
their bodies), so a failed build is a message and not an error. And an editable install stays what
it is, a mapping of package names to folders: a native change needs ``make native`` and no install.

``MQC_NATIVE``: ``auto`` (default), ``0`` (do not build) or ``require`` (fail where it fails).
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def build_native(prefix: Path) -> None:
    """Build into ``prefix``/backends/onnx/ and the like; see tools/build_native.sh."""
    mode = os.environ.get("MQC_NATIVE", "auto")
    if mode == "0":
        return
    prefix.mkdir(parents=True, exist_ok=True)
    command = [str(ROOT / "tools" / "build_native.sh"), str(prefix)]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        if mode == "require":
            raise SystemExit(f"MQC_NATIVE=require: {error}") from error
        print(f"mqc: installing without native libraries ({error})", file=sys.stderr)
        print("mqc: `mqc doctor` says what is missing", file=sys.stderr)


class BuildPy(build_py):
    """Python files, then the native libraries beside them."""

    def run(self) -> None:
        super().run()
        build_native(ROOT if self.editable_mode else Path(self.build_lib, "mqc").resolve())


class BdistWheel(bdist_wheel):
    """A wheel with a native library is for one platform, and for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if any(Path(self.bdist_dir).rglob("*.so")):
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return python, abi, platform


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
