"""Builds tgq_fast; the extension `tgq_fast._C` comes from the one CMakeLists.txt.

Environment:
    TGQ_CUDA        1, 0, or auto (default): with CUDA where nvcc and a GPU are, or TGQ_CUDA_ARCHS is set
    TGQ_CUDA_ARCHS  CUDA architectures, e.g. "80;90a"; default: the local GPU's, else 80 and 90a
    TGQ_CUTLASS_DIR  folder that holds cutlass/cutlass.h, for the Hopper kernels; default: the package nvidia-cutlass
    TGQ_JOBS        parallel compile jobs; default: bounded by cores and free memory
    CMAKE_ARGS      extra arguments for cmake
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
MEMORY_PER_JOB = 2 << 30  # nvcc with templates takes up to 2 GiB per translation unit


def commit() -> str:
    """The source commit: from git in a checkout, from csrc/COMMIT in an sdist."""
    stamp = ROOT / "csrc" / "COMMIT"
    if stamp.is_file():
        return stamp.read_text().strip()
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def jobs() -> int:
    """Compile jobs: what the cores and the free memory allow."""
    if os.environ.get("TGQ_JOBS"):
        return max(1, int(os.environ["TGQ_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        available = MEMORY_PER_JOB
    return max(1, min(cores, available // MEMORY_PER_JOB))


def cuda_setting() -> str:
    setting = os.environ.get("TGQ_CUDA", "auto").lower()
    known = {"0": "OFF", "off": "OFF", "1": "ON", "on": "ON", "auto": "AUTO", "": "AUTO"}
    if setting not in known:
        raise SystemExit(f"TGQ_CUDA: got {setting!r}, expected auto, 0 or 1")
    return known[setting]


class CMakeExtension(Extension):
    """An extension whose sources CMake knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configures and builds one target with CMake, into the place where setuptools expects the module."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / "cmake"
        work.mkdir(parents=True, exist_ok=True)
        arguments = [
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTGQ_VERSION={self.distribution.get_version()}",
            f"-DTGQ_COMMIT={commit()}",
            f"-DTGQ_CUDA={cuda_setting()}",
            "-DTGQ_BUILD_PYTHON=ON",
            "-DTGQ_BUILD_TESTS=OFF",
            f"-DTGQ_OUTPUT_DIR={target.parent}",
        ]
        for name in ("TGQ_CUDA_ARCHS", "TGQ_CUTLASS_DIR"):
            if os.environ.get(name):
                arguments.append(f"-D{name}={os.environ[name]}")
        if shutil.which("ninja"):
            arguments += ["-G", "Ninja"]
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        # An isolated build leaves paths of a deleted environment in the cache: configure afresh each time.
        (work / "CMakeCache.txt").unlink(missing_ok=True)
        if cuda_setting() != "OFF":
            print("TGQ_CUDA=0 leaves the CUDA search out; nvcc takes one to three minutes for it", flush=True)
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(work), *arguments], check=True)
        subprocess.run(["cmake", "--build", str(work), "--target", "_C", f"-j{jobs()}"], check=True)


class StampedBuild(build_py):
    """Writes the commit beside the sources of a wheel: `tgq_fast.io.identity` reads it there."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "tgq_fast" / "_build_info.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps({"commit": commit()}) + "\n")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return (
            outputs if self.editable_mode else [*outputs, str(Path(self.build_lib) / "tgq_fast" / "_build_info.json")]
        )


class StampedSdist(sdist):
    """Writes the commit into the source distribution, where there is no git to ask."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        (Path(base_dir) / "csrc" / "COMMIT").write_text(commit() + "\n")


setup(
    packages=[
        *find_packages(".", include=["tgq_fast", "tgq_fast.*"]),
        # kernels/ at the top of the tree is installed as tgq_fast.kernels, never as a global package `kernels`.
        "tgq_fast.kernels",
        *(f"tgq_fast.kernels.{name}" for name in find_namespace_packages("kernels", exclude=["__pycache__*"])),
    ],
    package_dir={"tgq_fast.kernels": "kernels"},
    package_data={
        "tgq_fast": ["py.typed"],
        "tgq_fast.kernels": ["tiles/*.json"],
        "tgq_fast.serve": ["static/*"],
        "tgq_fast.report": ["*.css", "*.j2"],
    },
    include_package_data=False,
    ext_modules=[CMakeExtension("tgq_fast._C")],
    cmdclass={"build_ext": CMakeBuild, "build_py": StampedBuild, "sdist": StampedSdist},
)
