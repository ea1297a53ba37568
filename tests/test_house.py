"""How the tree is kept: layers import downwards, files stay short, the library neither prints nor names options."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tgq_fast"
LONGEST = 400

# docs/architecture.md has the same in words. A module may import from its own row and from rows below.
LAYERS = [
    {"app", "__main__"},
    {"serve", "study"},
    {"report"},
    {"workflow"},
    {"training", "scale", "integrations"},
    {"retrieval"},  # deprecated: passes names of the next three on
    {"evaluation"},
    {"pool"},
    {"search"},
    {"models"},
    {"data"},
    {"ops"},
    {"reference", "kernels"},
    {"_native", "_version", "arguments", "defaults", "errors", "io", "watch"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def sources(*suffixes: str) -> Iterator[Path]:
    for folder in ("tgq_fast", "kernels", "csrc", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and "__pycache__" not in path.parts:
                yield path


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything of tgq_fast that a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], base]).rstrip(".")
            if base == "tgq_fast":
                yield from ((node.lineno, f"tgq_fast.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def library() -> Iterator[tuple[Path, str, ast.Module]]:
    """(file, first name below tgq_fast, syntax tree) of every module."""
    for path in sources(".py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in ("tgq_fast", "kernels"):
            name = "kernels" if parts[0] == "kernels" else parts[1]
            yield path, name, ast.parse(path.read_text(encoding="utf-8"))


def test_no_file_is_long() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources(".py", ".cpp", ".cu", ".h", ".cuh")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert not long, long


def test_imports_point_downwards() -> None:
    upward = []
    for path, own, tree in library():
        if own == "__init__":
            continue
        assert own in RANK, f"{path}: give {own} a layer"
        package = ".".join(path.relative_to(ROOT).parts[:-1])
        for line, name in imported(tree, package):
            parts = name.split(".")
            if parts[0] == "tgq_fast" and len(parts) > 1 and parts[1] in RANK and RANK[parts[1]] < RANK[own]:
                upward.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not upward, "\n".join(upward)


def test_benchmarks_and_tests_are_not_imported_by_the_package() -> None:
    for path, _, tree in library():
        for line, name in imported(tree, "tgq_fast"):
            assert name.split(".")[0] not in ("benchmarks", "tests"), f"{path}:{line}"


def test_only_device_functions_of_kernels_go_without_types() -> None:
    """mypy takes functions without types in kernels/, because Triton's have none."""
    for path, own, tree in library():
        for node in ast.walk(tree) if own == "kernels" else ():
            if isinstance(node, ast.FunctionDef) and node.returns is None:
                assert any("triton.jit" in ast.unparse(made) for made in node.decorator_list), f"{path}:{node.lineno}"


TERMINAL = {"app"}
"""Written for the command line: it prints, or says which command comes next."""


def test_the_library_neither_prints_nor_names_options() -> None:
    found = []
    for path, own, tree in library():
        if own in TERMINAL or "__main__" in ast.dump(tree):
            continue
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(f"{path}:{node.lineno} prints")
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                text = re.sub(r"(tgq-fast|pip install|python|both with|with) [^`'\"]*", "", node.value)
                if re.search(r"(?<![\w(-])--[a-z]{2}", text) and not text.startswith("--"):
                    found.append(f"{path}:{node.lineno} names an option: {node.value!r}")
    assert not found, "\n".join(found)


BELOW = {
    "common": ["common"],
    "search": ["common", "search"],
    "search/cpu": ["common", "search", "search/cpu"],
    "search/cuda": ["common", "search", "search/cuda"],
    "inference": ["common", "inference"],
    "bindings": ["common", "search", "inference", "bindings"],
}
"""Of csrc/, folder by folder: whose headers its files may include."""


def upward_includes(source: str, text: str) -> list[str]:
    """Includes of a file of csrc/, named from there, that are not its folder's to include."""
    includes = re.findall(r'#include "([^"]+)"', text)
    return [name for name in includes if name.rpartition("/")[0] not in BELOW[source.rpartition("/")[0]]]


def test_includes_point_downwards() -> None:
    files = list(p for p in sources(".h", ".cpp", ".cu", ".in") if p.is_relative_to(ROOT / "csrc"))
    assert len(files) > 50
    upward = {}
    for path in files:
        source = path.relative_to(ROOT / "csrc").as_posix()
        if found := upward_includes(source, path.read_text(encoding="utf-8")):
            upward[source] = found
    assert not upward, upward


@pytest.mark.parametrize(
    ("source", "include"),
    [
        ("common/isa.cpp", "search/cpu/kernel_set.h"),
        ("common/parallel.cpp", "search/search.h"),
        ("search/selection.h", "search/cpu/kernels.h"),
        ("search/cpu/scanner.cpp", "search/cuda/job.h"),
        ("search/cuda/plan.cpp", "search/cpu/kernels.h"),
        ("inference/linear.cpp", "search/search.h"),
        ("search/cpu/search.cpp", "bindings/search_cuda.h"),
        ("search/cpu/scanner.cpp", "scanner.h"),
    ],
)
def test_an_upward_include_is_seen(source: str, include: str) -> None:
    text = (ROOT / "csrc" / source).read_text(encoding="utf-8")
    assert upward_includes(source, text + f'#include "{include}"\n') == [include]


KEPT_ELSEWHERE = {
    "benchmarks/cases/other_build.py": "a folder of its own for another process",
    "benchmarks/memory.py": "a switch of the kernel's",
    "benchmarks/scale_sizes.py": "catalogues that it makes to be measured",
    "benchmarks/serve_load.py": "a script in a temporary folder",
    "benchmarks/steps.py": "a log that grows",
    "kernels/aot.py": "a temporary folder",
    "tgq_fast/data/importers/common.py": "parts that become a catalogue once they are whole",
    "tgq_fast/io/files.py": "what the others are to use",
    "tgq_fast/models/backbones.py": "a folder that becomes the cache's once it is whole",
    "tgq_fast/models/feature_files.py": "chunks that a journal counts once they are whole",
    "tgq_fast/pool/writer.py": "shards that nobody knows of before the commit",
    "tgq_fast/scale/process_worker.py": "its standard output",
    "tgq_fast/study/engine.py": "a log of another process",
    "tgq_fast/training/folder.py": "a log that grows",
}
"""Files that write by other means than io.files, and what: nothing that another process could find half written."""


def plain_writes(tree: ast.AST) -> Iterator[int]:
    """Lines that write a file under its own name."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func) == "ItemPool.open":
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        opens = name in ("open", "fdopen") and any(isinstance(m, str) and re.fullmatch("[wax]b?[+]?", m) for m in modes)
        if name in ("write_text", "write_bytes", "to_csv", "save_file") or opens:
            yield node.lineno


def test_files_appear_whole() -> None:
    found: dict[str, list[int]] = {}
    for path in sources(".py"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("tests/") and (lines := list(plain_writes(ast.parse(path.read_text(encoding="utf-8"))))):
            found[name] = lines
    assert not set(found) - set(KEPT_ELSEWHERE), found
    assert not set(KEPT_ELSEWHERE) - set(found), "these write by io.files now"
    planted = 'open(p, "w"); p.open(mode="ab"); p.write_text(t); open(p); p.open("rb"); os.fdopen(h, "wb")'
    assert len(list(plain_writes(ast.parse(planted)))) == 4


OF_JSON = ("json.load", "json.loads", "json.JSONDecodeError", "RecursionError")


def json_read_otherwise(tree: ast.AST) -> Iterator[int]:
    """Lines that read JSON otherwise, or guard against what Python's reader raises; round trips may."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    trips = {id(call.func) for call in calls if re.match(r"(json\.dumps|_json)\(", ast.unparse(call.args[0]))}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)) and id(node) not in trips and ast.unparse(node) in OF_JSON:
            yield node.lineno


def test_json_has_one_reader() -> None:
    for path, _, tree in library():
        if path.name not in ("json_text.py", "json_lines.py"):
            assert not list(json_read_otherwise(tree)), path
    planted = "json.loads(a)\nmap(json.loads, b)\njson.loads(json.dumps(c))\ntry: f()\nexcept RecursionError: g()"
    assert sorted(json_read_otherwise(ast.parse(planted))) == [1, 2, 5]
