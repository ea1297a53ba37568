"""The package as it is installed: lazy import, public names, kernels under their own name, wheel from sdist."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tgq_fast
from tgq_fast import _native

ROOT = Path(__file__).parents[1]


def run(code: str, **options) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, **options).stdout


def test_import_is_light() -> None:
    loaded = run("import sys, tgq_fast; print(*[m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])")
    assert loaded.strip() == ""


@pytest.mark.parametrize("name", tgq_fast.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(tgq_fast, name)
    assert not isinstance(value, type(os)), f"{name} is a module"
    assert name in dir(tgq_fast)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'top_k'"):
        tgq_fast.top_k  # noqa: B018


def test_lazy_table_and_all_agree() -> None:
    assert set(tgq_fast.__all__) - {"__version__"} <= set(tgq_fast._EXPORTS)


def test_kernels_come_under_the_package_and_never_as_a_global_package() -> None:
    importlib.import_module("tgq_fast.kernels")
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s is not None and s.origin is not None)"
    assert run(code, cwd=ROOT).strip() == "False"  # at most a namespace without code of its own
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_build_facts() -> None:
    if not _native.available():
        assert _native.why_missing() and _native.build_info() == {}
        pytest.skip(_native.why_missing())
    facts = _native.build_info()
    assert facts["version"] == tgq_fast.__version__
    assert facts["isas"][0] == "scalar" and facts["isa"] in facts["isas"]
    assert bool(facts["cuda_version"]) != bool(facts["cuda_reason"])
    assert _native.why_missing() == ""


def test_a_missing_extension_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from tgq_fast.errors import BackendError
    from tgq_fast.search.topk import topk

    reason = "the extension is not built: for this test"
    monkeypatch.setattr(_native, "_load", lambda: (None, reason))
    assert not _native.available() and _native.why_missing() == reason
    assert topk(torch.eye(3), torch.eye(3), 1).indices.tolist() == [[0], [1], [2]]  # auto falls back
    with pytest.raises(BackendError, match="for this test"):
        topk(torch.eye(3), torch.eye(3), 1, backend="cpp")


@pytest.mark.slow
def test_wheel_from_the_source_distribution(tmp_path: Path) -> None:
    environment = {**os.environ, "TGQ_CUDA": "0", "PIP_NO_INPUT": "1"}
    build = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--skip-dependency-check",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]
    built = subprocess.run(build, env=environment, capture_output=True, text=True)  # sdist, then the wheel from it
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("tgq_fast/_C.") for name in names)
    assert not any(name.startswith(("kernels/", "tests/", "csrc/")) for name in names)
    assert any(name.startswith("tgq_fast/kernels/") for name in names) or not list((ROOT / "kernels").glob("*.py"))
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import tgq_fast, tgq_fast._native as n; print(tgq_fast.__file__); print(n.build_info()['commit'])"
    printed = run(code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}).splitlines()
    assert printed[0].startswith(str(tmp_path))
    assert printed[1] != "unknown"
    stamp = json.loads((tmp_path / "site" / "tgq_fast" / "_build_info.json").read_text())  # runs and pools keep it
    assert stamp == {"commit": printed[1]}
    code = "from tgq_fast.io.identity import package_identity as i; print(i()['commit'])"
    assert run(code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}).strip() == printed[1]


def test_built_sources_carry_the_commit(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    asked = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if asked.returncode:
        pytest.skip("no git checkout")
    assert json.loads((tmp_path / "tgq_fast" / "_build_info.json").read_text()) == {"commit": asked.stdout.strip()}
