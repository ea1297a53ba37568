"""Compile any kernel for any GPU without one, and read what the machine code says about it.

Triton compiles ahead of time for a named architecture and its wheel carries the disassembler, so that spills, local
memory, shared memory and the instructions used are facts that a machine without a GPU can check. Speed is not.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tgq_fast.io.json_text import read_json
from tgq_fast.kernels import (
    cross_attention,
    cross_attention_backward,
    cross_attention_fused,
    info_nce,
    modulation,
    redundancy,
    softmax,
    stream_attention,
    stream_attention_backward,
)
from tgq_fast.kernels.tiling import FOLDER

# Bytes of shared memory that one block may use.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Instructions that feed the tensor cores, by architecture: warpgroup and tensor-memory forms first.
MATRIX = {80: ("HMMA",), 90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "HMMA")}
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_NAMES = {"bf16": 16, "fp16": 16, "fp32": 32}


@dataclass(frozen=True)
class Kernel:
    """How to type the parameters of a kernel; integers without an entry are 32-bit sizes or strides.

    Attributes:
        function: the jitted function.
        element: pointers to the compute dtype.
        fp32, mask, index: pointers to fp32, bool and int64.
        floats: fp32 scalars.
        ones: strides that are 1 in every launch of interest.
        flags: compile-time switches beside the tile.
        width: compile-time width that the launcher derives from the shapes, and the bound of the tile row it follows.
        tile: name in the tile tables, when it is not the kernel's own.
        bits: element widths it is launched with.
        matrix: whether it multiplies matrices.
    """

    function: Any
    element: str
    fp32: str = ""
    mask: str = ""
    index: str = ""
    floats: str = ""
    ones: str = ""
    flags: tuple[tuple[str, Any], ...] = ()
    width: tuple[str, str] | None = None
    tile: str | None = None
    bits: tuple[int, ...] = (16, 32)
    matrix: bool = True


_HEAD = ("BLOCK_D", "max_head")
_RANK = ("RANK", "max_rank")
# Self-attention in blocks, and projected cross-attention, which alone has a guide.
_BLOCK = (("MODE", 1), ("SEES_TEXT", False), ("HAS_MASK", True), ("HAS_GUIDE", False))
_ALL = (("MODE", 0), ("SEES_TEXT", False), ("HAS_MASK", True), ("HAS_GUIDE", True))
_STREAM_FORWARD = "q k v out", "lse entropy mass guide guide_scale", "key_mask key_group"
_ROWS = "q k v out d_out d_q", "lse delta guide guide_scale d_guide_scale", "key_mask"
_KEYS = "q k v d_out d_k d_v", "lse delta guide guide_scale", "key_mask"
KERNELS: dict[str, Kernel] = {
    "absorbed_forward": Kernel(
        cross_attention.absorbed_forward, "q x out", "lse entropy mass guide guide_scale", "key_mask key_group",
        floats="scale", flags=(("HAS_MASK", True), ("HAS_GROUP", True), ("HAS_GUIDE", True), ("WANT_ENTROPY", True)),
    ),
    "absorbed_backward_rows": Kernel(
        cross_attention_backward.absorbed_backward_rows, "q x d_out d_q", "lse delta guide guide_scale d_guide_scale",
        "key_mask", floats="scale", flags=(("HAS_MASK", True), ("HAS_GUIDE", True), ("ACCUMULATE", False)),
    ),
    "absorbed_backward_tokens": Kernel(
        cross_attention_backward.absorbed_backward_tokens, "q x d_out d_x", "lse delta guide guide_scale", "key_mask",
        floats="scale", flags=(("HAS_MASK", True), ("HAS_GUIDE", True), ("ACCUMULATE", False)),
    ),
    "fused_forward": Kernel(
        cross_attention_fused.fused_forward, "q x wk wv bias out", "lse entropy mass guide guide_scale",
        "key_mask key_group", floats="scale",
        flags=(
            ("HAS_BIAS", True), ("HAS_MASK", True), ("HAS_GROUP", True), ("HAS_GUIDE", True), ("WANT_ENTROPY", True),
        ),
        width=_HEAD,
    ),
    "merge_parts": Kernel(
        softmax.merge_parts, "out", "part_out part_lse part_entropy part_mass lse entropy mass",
        flags=(("HAS_GROUP", True), ("WANT_ENTROPY", True)), bits=(32,), matrix=False,
    ),
    "stream_forward": Kernel(
        stream_attention.stream_forward, *_STREAM_FORWARD, floats="scale",
        flags=(*_BLOCK, ("HAS_GROUP", False), ("WANT_ENTROPY", False)), width=_HEAD,
    ),
    "projected_forward": Kernel(
        stream_attention.stream_forward, *_STREAM_FORWARD, floats="scale",
        flags=(*_ALL, ("HAS_GROUP", True), ("WANT_ENTROPY", True)), width=_HEAD, tile="stream_forward",
    ),
    "stream_backward_rows": Kernel(
        stream_attention_backward.stream_backward_rows, *_ROWS, floats="scale", flags=_BLOCK, width=_HEAD,
    ),
    "projected_backward_rows": Kernel(
        stream_attention_backward.stream_backward_rows, *_ROWS, floats="scale", flags=_ALL, width=_HEAD,
        tile="stream_backward_rows",
    ),
    "stream_backward_keys": Kernel(
        stream_attention_backward.stream_backward_keys, *_KEYS, floats="scale", flags=_BLOCK, width=_HEAD,
    ),
    "projected_backward_keys": Kernel(
        stream_attention_backward.stream_backward_keys, *_KEYS, floats="scale", flags=_ALL, width=_HEAD,
        tile="stream_backward_keys",
    ),
    "modulation_forward": Kernel(
        modulation.modulation_forward,
        "a e agreement has_metadata image flag_a w1a b1a w2a b2a w1e b1e w2e b2e out_a out_e gate_a gate_e mean_a "
        "mean_e",
        "pre_a pre_e", floats="alpha", ones="b2_c", width=_RANK,
    ),
    "modulation_backward": Kernel(
        modulation.modulation_backward,
        "a e d_out_a d_out_e d_gate_a d_gate_e gate_a gate_e w1a w2a w1e w2e d_a d_e d_image",
        "pre_a pre_e d_logit_a d_logit_e d_pre_a d_pre_e", floats="alpha", ones="gate_c",
        flags=(("HAS_D_GATE", True),), width=_RANK,
    ),
    "block_moments": Kernel(redundancy.block_moments, "a e", "out", tile="redundancy", matrix=False),
    "merge_moments": Kernel(
        redundancy.merge_moments, "", "moments merged terms", floats="eps", tile="redundancy_merge", bits=(32,),
        matrix=False,
    ),
    "redundancy_backward": Kernel(
        redundancy.redundancy_backward, "a e d_a d_e", "merged d_loss", floats="eps", tile="redundancy", matrix=False
    ),
    "info_nce_forward": Kernel(
        info_nce.info_nce_forward, "x log_scale lse picked", index="rows positives groups",
        flags=(("HAS_GROUPS", True),), bits=(32,),
    ),
    "info_nce_backward_anchors": Kernel(
        info_nce.info_nce_backward_anchors, "x log_scale lse d_x d_scale", index="rows positives groups",
        flags=(("HAS_GROUPS", True),), tile="info_nce_backward", bits=(32,),
    ),
    "info_nce_backward_items": Kernel(
        info_nce.info_nce_backward_items, "x log_scale lse d_x", index="rows positives groups",
        flags=(("HAS_GROUPS", True),), tile="info_nce_backward", bits=(32,),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What the compiler and disassembler say: resources of one thread or block and instruction counts by opcode."""

    kernel: str
    arch: int
    dtype: str
    options: dict[str, int]
    registers: int
    stack: int
    local: int
    shared: int
    opcodes: Counter[str]

    def count(self, prefix: str) -> int:
        """Instructions whose opcode starts with `prefix`."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefix))

    @property
    def matrix(self) -> str | None:
        """The best matrix instruction present."""
        return next((name for name in MATRIX[self.arch] if self.count(name)), None)

    @property
    def wide_loads(self) -> int:
        """16-byte loads from global memory, direct or asynchronous to shared memory."""
        return sum(
            n for op, n in self.opcodes.items() if op.startswith(("LDG", "LDGSTS")) and (".128" in op)
        ) + self.count("UTMALDG")

    @property
    def spills(self) -> int:
        """Accesses to local memory."""
        return self.count("LDL") + self.count("STL")


def rows(name: str, arch: int, bits: int) -> list[dict[str, int]]:
    """Tile rows of a kernel in the shipped table of an architecture."""
    data = read_json((FOLDER / f"sm_{arch}.json").read_bytes())
    found: list[dict[str, int]] = data["kernels"].get(KERNELS[name].tile or name, {}).get(str(bits), [])
    return found


def variants(archs: tuple[int, ...] = (80, 90, 100)) -> Iterator[tuple[str, int, int, dict[str, int]]]:
    """Every (kernel, architecture, element width, tile row) that is shipped."""
    for arch in archs:
        for name, kernel in KERNELS.items():
            for bits in kernel.bits:
                for row in rows(name, arch, bits):
                    yield name, arch, bits, row


def build(name: str, arch: int, dtype: str, row: dict[str, int], precision: str = "ieee") -> Report:
    """Compile one kernel with one tile row and disassemble it.

    Args:
        arch: 80, 90 or 100.
        dtype: "bf16", "fp16" or "fp32".
    """
    kernel = KERNELS[name]
    options = {key: value for key, value in row.items() if not key.startswith("max_")}
    launch = {key: options.pop(key) for key in ("num_warps", "num_stages")}
    constants = {**dict(kernel.flags), "PRECISION": precision, **options}
    if kernel.width is not None:
        constants[kernel.width[0]] = row[kernel.width[1]]
    types = {**dict.fromkeys(kernel.element.split(), f"*{dtype}"), **dict.fromkeys(kernel.fp32.split(), "*fp32")}
    types |= {**dict.fromkeys(kernel.mask.split(), "*i1"), **dict.fromkeys(kernel.index.split(), "*i64")}
    types |= dict.fromkeys(kernel.floats.split(), "fp32")
    signature, values, hints = {}, {}, {}
    for position, parameter in enumerate(kernel.function.params):
        key = parameter.name
        if parameter.is_constexpr or key in kernel.ones.split():
            signature[key], values[(position,)] = "constexpr", constants.get(key, 1)
            continue
        signature[key] = types.get(key, "i32")
        if (signature[key].startswith("*") or signature[key] == "i32") and not parameter.do_not_specialize:
            hints[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.function, signature, values, hints)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(cubin))
        listing = _run("nvdisasm", "-c", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resources for {name}: {usage[-400:]}")
    pattern = r"^\s+(?:\/\*[0-9a-f]+\*\/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)"
    opcodes = Counter(re.findall(pattern, listing, re.MULTILINE))
    registers, stack, local = map(int, found.groups())
    return Report(name, arch, dtype, launch | options, registers, stack, local, built.metadata.shared, opcodes)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_BINARIES / tool), *arguments], capture_output=True, text=True, check=True).stdout


def limits_broken(report: Report, bits: int) -> list[str]:
    """What a report must not show: spills, local memory, too much shared memory, products off the tensor cores."""
    broken = []
    if report.spills or report.stack or report.local:
        broken.append(f"{report.spills} local accesses, {report.stack} bytes of stack, {report.local} of local memory")
    if report.shared > SHARED_LIMIT[report.arch]:
        broken.append(f"{report.shared} bytes of shared memory exceed {SHARED_LIMIT[report.arch]}")
    kernel = KERNELS[report.kernel]
    if kernel.matrix and bits == 16:
        # A warpgroup instruction needs 64 rows; smaller tiles use the warp-level form.
        rows_of_tile = max(report.options.get(key, 0) for key in ("BLOCK_R", "BLOCK_S", "BLOCK_N"))
        wanted = MATRIX[report.arch][0] if rows_of_tile >= 64 else None
        if report.matrix is None or (wanted is not None and report.matrix != wanted):
            broken.append(f"matrix instruction is {report.matrix}, not {wanted or 'any'}")
    if report.kernel != "merge_moments" and not report.wide_loads:
        broken.append("no 16-byte global load")
    return broken


def main() -> None:
    """Compile shipped tile rows and print one JSON line each: python -m tgq_fast.kernels.aot --archs 90 --bits 16."""
    import argparse

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--archs", default="80,90,100")
    parser.add_argument("--bits", default="16,32")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="comma-separated kernel names")
    parser.add_argument("--first", action="store_true", help="one row per kernel: the first of 256 keys or more")
    given = parser.parse_args()
    done = set()
    for name, arch, bits, row in variants(tuple(int(a) for a in given.archs.split(","))):
        if str(bits) not in given.bits.split(",") or name not in given.kernels.split(","):
            continue
        if given.first and ((name, arch, bits) in done or row.get("max_keys", 256) < 256):
            continue
        done.add((name, arch, bits))
        report = build(name, arch, "bf16" if bits == 16 else "fp32", row)
        line = {
            "kernel": name, "arch": arch, "dtype": report.dtype, "row": row, "registers": report.registers,
            "shared": report.shared, "spills": report.spills, "matrix": report.matrix,
            "wide_loads": report.wide_loads, "broken": limits_broken(report, bits),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
