"""setuptools' build backend, and CUTLASS' headers among what a build with the Hopper kernels requires."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the hooks of PEP 517 and 660)

CUTLASS = "nvidia-cutlass==4.2.0.0"  # header files; nothing of it is in the wheel


def _has_gpu() -> bool:
    """Whether TGQ_CUDA=auto builds the CUDA search: the rule of CMakeLists.txt."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    except OSError:
        return False


def _wants_cutlass() -> bool:
    setting = os.environ.get("TGQ_CUDA", "auto").lower()
    if setting in ("0", "off") or os.environ.get("TGQ_CUTLASS_DIR"):
        return False
    if setting in ("", "auto") and not os.environ.get("TGQ_CUDA_ARCHS") and not _has_gpu():
        return False
    if "90a" not in os.environ.get("TGQ_CUDA_ARCHS", "90a"):
        return False
    return any(map(shutil.which, (os.environ.get("CUDACXX", "nvcc"), "/usr/local/cuda/bin/nvcc")))


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *([CUTLASS] if _wants_cutlass() else [])]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *([CUTLASS] if _wants_cutlass() else [])]
