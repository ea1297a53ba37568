"""What the compiler makes of the CUDA sources, and what the module does where there is no driver. No GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = CSRC / "search" / "cuda"
ARCHS = ("80", "90a", "100a")
UNITS = [*[(unit, arch) for arch in ARCHS for unit in ("portable", "search", "skinny")], ("hopper", "90a")]
# Registers per thread: what lets two blocks of the heavy kernels share a multiprocessor (Hopper's own kernel: one block
# of three warpgroups).
LIMITS = {"portable_filter": 128, "skinny_filter": 128, "direct_scan": 128, "ThresholdEpilogue": 168, "": 64}

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def cutlass() -> Path | None:
    """Folder of the CUTLASS headers."""
    if os.environ.get("TGQ_CUTLASS_DIR"):
        return Path(os.environ["TGQ_CUTLASS_DIR"])
    spec = importlib.util.find_spec("cutlass_library")
    return Path(spec.submodule_search_locations[0]) / "source" / "include" if spec else None


def cuda_tool(name: str) -> str | None:
    """A binary of the CUDA toolkit: on the path, beside nvcc, or the copy that triton brings."""
    spec = importlib.util.find_spec("triton")
    folders = [Path("/usr/local/cuda/bin")]
    if spec and spec.submodule_search_locations:
        folders.append(Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin")
    found = shutil.which(name)
    return found or next((str(f / name) for f in folders if (f / name).is_file()), None)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory):
    """Compiles a unit for an architecture, once: (kernel → (stack, spilled bytes, registers), SASS)."""
    folder, done = tmp_path_factory.mktemp("cubin"), {}

    def compile_unit(unit: str, arch: str) -> tuple[dict[str, tuple[int, int, int]], str]:
        if (unit, arch) not in done:
            cubin = folder / f"{unit}_{arch}.cubin"
            command = ["nice", NVCC, "-std=c++17", "-O3", "-DNDEBUG", "-cubin", "-Xptxas", "-v", "-o", cubin]
            command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{CSRC}"]
            if unit == "hopper":
                command += ["--expt-relaxed-constexpr", f"-I{cutlass()}"]
            else:
                command.append("-fmad=false")
            run = subprocess.run([*command, SOURCES / f"{unit}.cu"], capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            tool = cuda_tool("cuobjdump")
            sass = ""
            if tool is not None:
                sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
            done[unit, arch] = (resources(run.stderr), sass)
        return done[unit, arch]

    return compile_unit


def resources(report: str) -> dict[str, tuple[int, int, int]]:
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, report, re.DOTALL)
    return {name: (int(stack), int(stores) + int(loads), int(used)) for name, stack, stores, loads, used in found}


def skip_without_headers(unit: str) -> None:
    if unit == "hopper" and (cutlass() is None or not cutlass().is_dir()):
        pytest.skip("no CUTLASS headers: pip install --no-deps nvidia-cutlass==4.2.0.0, or set TGQ_CUTLASS_DIR")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("unit", "arch"), UNITS)
def test_nothing_spills(compiled, unit: str, arch: str) -> None:
    skip_without_headers(unit)
    kernels, _ = compiled(unit, arch)
    assert len(kernels) == {"portable": 2, "search": 9, "skinny": 12, "hopper": 6}[unit]
    for name, (stack, spilled, registers) in kernels.items():
        limit = next(most for part, most in LIMITS.items() if part in name)
        assert (stack, spilled) == (0, 0) and registers <= limit, (name, stack, spilled, registers)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(cuda_tool("cuobjdump") is None, reason="no cuobjdump")
@pytest.mark.parametrize(("unit", "arch"), UNITS)
def test_matrix_instructions(compiled, unit: str, arch: str) -> None:
    skip_without_headers(unit)
    _, sass = compiled(unit, arch)
    wanted = {
        "portable": ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDGSTS", "LDSM.16.M88.4"),
        "search": ("FFMA", "SHFL.BFLY", "ATOM"),
        "skinny": ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDG.E.EF.128", "LDS.128"),
        "hopper": (
            *("HGMMA.64x128x16.F32.BF16", "HGMMA.64x128x16.F32 ", "HGMMA.64x256x16.F32.BF16", "HGMMA.64x256x16.F32 "),
            *("UTMALDG", "MULTICAST"),
        ),
    }[unit]
    for instruction in wanted:
        assert instruction in sass, instruction
    assert "LDL" not in sass and "STL" not in sass  # local memory


@needs_nvcc
@pytest.mark.slow
def test_fragments_lie_where_the_kernels_take_them(tmp_path: Path) -> None:
    skip_without_headers("hopper")
    program = tmp_path / "layouts"
    command = ["nice", NVCC, "-std=c++17", "-DNDEBUG", "-gencode=arch=compute_90a,code=sm_90a", "-o", program]
    command += ["--expt-relaxed-constexpr", f"-I{cutlass()}", f"-I{CSRC}"]
    command.append(Path(__file__).with_name("layouts.cu"))
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert subprocess.run([program], capture_output=True, text=True).stdout == "as assumed\n"


def module_facts(folder: Path) -> str:
    """Loads the module from `folder` in a fresh interpreter, searches on the CPU and asks for a GPU."""
    program = """
import array, sys
sys.path.insert(0, sys.argv[1])
import _C
values = array.array("f", [1, 0, 0, 1, 1, 1])
scores, rows = array.array("f", [0] * 2), array.array("q", [0] * 2)
pool = (values.buffer_info()[0], 3, 2, 2, 1, 0)
query = (values.buffer_info()[0] + 16, 1, 2, 2, 1, 0)
results = scores.buffer_info()[0], rows.buffer_info()[0]
status = _C.search_cpu(query, pool, 2, scores=results[0], rows=results[1], threads=1)
print(status, list(rows), list(scores), sep="|")
print(_C.build_info()["cuda_version"], _C.why_no_cuda(0), _C.why_no_cuda(-1), sep="|")
print(_C.cuda_workspace(query, pool, 2, 0, 0, 0, False, 0, {"engine": 2})[:2], sep="|")
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


@needs_nvcc
@pytest.mark.slow
def test_a_module_with_cuda_works_without_a_driver(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    command = ["nice", "-n", "10", "cmake", "-S", ROOT, "-B", tmp_path / "build", "-DTGQ_BUILD_PYTHON=ON"]
    command += ["-DTGQ_CUDA=ON", "-DTGQ_CUDA_ARCHS=80", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DTGQ_OUTPUT_DIR={tmp_path / 'out'}"]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run(["nice", "-n", "10", "cmake", "--build", tmp_path / "build"], check=True, capture_output=True)
    (library,) = (tmp_path / "out").glob("_C*.so")
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in needed and "libcuda" not in needed  # neither the driver nor a shared CUDA runtime
    search, facts, workspace = module_facts(library.parent).splitlines()
    assert search == "0|[2, 0]|[2.0, 1.0]"
    version, reason, no_such = facts.split("|")
    assert version and reason not in ("", "None") and no_such == "no such CUDA device"
    assert workspace == str((4, reason))


@needs_nvcc
@pytest.mark.slow
def test_the_module_builds_and_imports_with_cuda(tmp_path: Path) -> None:
    """The whole extension with its CUDA search links and loads on a machine without a driver."""
    import pybind11

    options = [
        "-DTGQ_CUDA=ON",
        "-DTGQ_CUDA_ARCHS=80",
        "-DTGQ_BUILD_PYTHON=ON",
        f"-DTGQ_OUTPUT_DIR={tmp_path}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    for step in (["-S", ROOT, "-B", tmp_path / "build", *options], ["--build", tmp_path / "build", "-j", "2"]):
        done = subprocess.run(["nice", "cmake", *map(str, step)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import _C; print(_C.build_info()['cuda_archs'])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "80" in printed
