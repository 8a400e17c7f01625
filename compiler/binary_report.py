"""What a GPU binary says about itself before it ever runs: registers, spills, shared memory, and its main loop.

Figures of NVIDIA's binaries are read with the cuobjdump and nvdisasm that Triton's wheel ships. Those of AMD's come
from the metadata note of the ELF file and, since nothing in the wheel disassembles, for the main loop from what was
counted in the assembly text at build time and stands in kernels.json (`loop_of_amdgcn`).

The main loop is the innermost loop that holds the most matrix instructions; one turn of it is one unit of 64 channels.
"""

import importlib.util
import json
import re
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hif4c.runtime.errors import Hif4Error

__all__ = ["BinaryReport", "Loop", "Resources", "analyse", "loop_of_amdgcn", "loop_of_sass", "resources"]


@dataclass(frozen=True)
class Loop:
    """A main loop.

    Attributes:
        instructions: in its body, per warp (AMD: wavefront) and turn.
        matrix_instruction: the most frequent matrix instruction of the body, as disassembled.
        matrix_count: how many matrix instructions of any kind.
        spills: loads and stores of spilled registers.
        opcodes: count of each opcode without its suffixes, most frequent first.
    """

    instructions: int
    matrix_instruction: str
    matrix_count: int
    spills: int
    opcodes: dict[str, int]


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    Attributes:
        entry: its name.
        registers: of a thread (AMD: vector registers).
        spills: instructions that load or store spilled registers (AMD: registers spilled).
        shared: bytes of static shared memory.
    """

    entry: str
    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class BinaryReport:
    """The static figures of one binary.

    Attributes:
        target: "cuda-sm80", ...
        entry: name of the kernel in the binary.
        registers: of a thread (AMD: vector registers).
        spills: in the whole kernel, as in `Resources`.
        static_shared: bytes of shared memory in the binary.
        dynamic_shared: bytes that the launch adds, from kernels.json.
        threads: of a block, from kernels.json.
        blocks: that fit one multiprocessor by registers, threads and shared memory.
        instructions: of the whole kernel; None where nothing disassembles it.
        loop: the main loop; None for a kernel without matrix instructions.
    """

    target: str
    entry: str
    registers: int
    spills: int
    static_shared: int
    dynamic_shared: int
    threads: int
    blocks: int
    instructions: int | None
    loop: Loop | None


@dataclass(frozen=True)
class _Machine:
    """One multiprocessor (AMD: compute unit): registers in units of a warp's allocation, warps, shared memory."""

    registers: int  # 32-bit registers, all lanes
    granule: int  # registers of a thread are handed out in multiples of this
    warps: int
    shared: int  # bytes
    reserved: int  # bytes of shared memory that each block takes besides its own
    blocks: int


# CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"; CDNA 3 ISA guide for gfx942,
# whose 4 SIMDs have 512 vector registers a lane each and run up to 8 wavefronts.
_MACHINES = {
    "cuda-sm80": _Machine(65536, 8, 64, 167936, 1024, 32),
    "cuda-sm89": _Machine(65536, 8, 48, 102400, 1024, 24),
    "cuda-sm90": _Machine(65536, 8, 64, 233472, 1024, 32),
    "cuda-sm100": _Machine(65536, 8, 64, 233472, 1024, 32),
    "cuda-sm120": _Machine(65536, 8, 48, 102400, 1024, 24),
    "hip-gfx942": _Machine(4 * 512 * 64, 8, 32, 65536, 0, 32),
}

_SASS_LABEL = re.compile(r"^\s*(\.L_\S+):")
_SASS_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_SASS_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_[^)]+)\)")
_SASS_GUARD = re.compile(r"^@!?U?P\w+\s+")
_SASS_MATRIX = re.compile(r"(?:[IHQ]|IG|HG|QG|UTC[A-Z]*)MMA\b")
_SASS_SPILLS = ("LDL", "STL")

_GCN_LABEL = re.compile(r"^(\.LBB\w+):")
_GCN_BRANCH = re.compile(r"^s_c?branch\w*\s+(\.LBB\w+)")
_GCN_MATRIX = re.compile(r"v_s?mfmac?_")
_GCN_SPILL = re.compile(r";.*Folded (Spill|Reload)")


def analyse(path: Path, target: str) -> BinaryReport:
    """The figures of a binary in kernels/TARGET of an artifact; kernels.json lies beside it.

    Raises:
        Hif4Error: Triton's tools are not installed, or the file is not a binary of that target.
    """
    if target not in _MACHINES:
        raise Hif4Error(f"{path}: there are no GPU binaries for {target}; known: {', '.join(_MACHINES)}.")
    properties = _properties(path)
    used = resources(path, target)
    threads = properties["num_warps"] * properties["warp_size"]
    dynamic = properties["shared"]
    blocks = _blocks(_MACHINES[target], used, dynamic, properties["num_warps"], properties["warp_size"])
    if target.startswith("cuda"):
        instructions, loop = loop_of_sass(_disassemble(path))
        count = len(instructions)
    else:
        stored = properties.get("loop")
        loop, count = None if stored is None else Loop(**stored), None
    return BinaryReport(
        target, used.entry, used.registers, used.spills, used.shared, dynamic, threads, blocks, count, loop
    )


def resources(path: Path, target: str) -> Resources:
    """What the one kernel of a binary takes.

    Raises:
        Hif4Error: as `analyse`.
    """
    if not target.startswith("cuda"):
        return _amd_resources(path)
    text = _run("cuobjdump", "-res-usage", str(path))
    found = re.search(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    if found is None:
        raise Hif4Error(f"{path}: is not a CUDA binary with a kernel.")
    spills = 0
    if int(found[3]):  # without a stack there is nowhere to spill to, and nothing to disassemble for
        opcodes = map(_opcode, loop_of_sass(_disassemble(path))[0])
        spills = sum(opcode.startswith(_SASS_SPILLS) for opcode in opcodes)
    return Resources(found[1], int(found[2]), spills, int(found[4]))


def loop_of_sass(text: str) -> tuple[list[str], Loop | None]:
    """The instructions in what `nvdisasm -c` prints, and the main loop among them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif matched := _SASS_INSTRUCTION.match(line):
            instructions.append(matched[1])
    loops = []
    for end, instruction in enumerate(instructions):
        branch = _SASS_BRANCH.search(instruction)
        if branch and labels.get(branch[1], end + 1) <= end:
            loops.append((labels[branch[1]], end + 1))
    opcodes = [_opcode(instruction) for instruction in instructions]
    return instructions, _main_loop(
        opcodes, loops, lambda opcode: bool(_SASS_MATRIX.match(opcode)), lambda opcode: opcode.startswith(_SASS_SPILLS)
    )


def loop_of_amdgcn(text: str) -> Loop | None:
    """The main loop in the assembly text of a kernel for AMD."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _GCN_LABEL.match(line):
            labels[label[1]] = len(instructions)
            continue
        stripped = line.partition(";")[0].strip()
        if line.startswith("\t") and stripped and not stripped.startswith("."):
            spill = "spill " if _GCN_SPILL.search(line) else ""
            instructions.append(spill + stripped)
    loops = []
    for end, instruction in enumerate(instructions):
        branch = _GCN_BRANCH.match(instruction)
        if branch and labels.get(branch[1], end + 1) <= end:
            loops.append((labels[branch[1]], end + 1))
    opcodes = [instruction.split()[0] for instruction in instructions]
    return _main_loop(opcodes, loops, lambda opcode: bool(_GCN_MATRIX.match(opcode)), lambda opcode: opcode == "spill")


def _main_loop(
    opcodes: Sequence[str],
    loops: Sequence[tuple[int, int]],
    is_matrix: Callable[[str], bool],
    is_spill: Callable[[str], bool],
) -> Loop | None:
    """Of loops [start, end), the one with the most matrix instructions among those that contain no other with any.

    A branch back from cold code at the end of a kernel (a wait that did not succeed at once) looks like a loop around
    everything; it contains the real ones.
    """
    counts = {loop: sum(map(is_matrix, opcodes[slice(*loop)])) for loop in loops}
    inner = [
        loop
        for loop, count in counts.items()
        if count
        and not any(
            other != loop and number and loop[0] <= other[0] and other[1] <= loop[1] for other, number in counts.items()
        )
    ]
    if not inner:
        return None
    start, end = max(inner, key=lambda loop: (counts[loop], -loop[0]))
    body = opcodes[start:end]
    matrix = Counter(filter(is_matrix, body)).most_common(1)[0][0]
    short = Counter(opcode.split(".")[0] for opcode in body)
    ordered = dict(sorted(short.items(), key=lambda item: (-item[1], item[0])))
    return Loop(end - start, matrix, counts[start, end], sum(map(is_spill, body)), ordered)


def _opcode(instruction: str) -> str:
    return _SASS_GUARD.sub("", instruction).split()[0]


def _blocks(machine: _Machine, used: Resources, dynamic: int, warps: int, warp_size: int) -> int:
    registers = -(-used.registers // machine.granule) * machine.granule * warp_size * warps
    # What the linker counts as static on newer architectures is the share that the system reserves in each block.
    shared = max(used.shared, machine.reserved) + dynamic
    by_shared = machine.shared // shared if shared else machine.blocks
    return min(machine.registers // registers, machine.warps // warps, by_shared, machine.blocks)


def _properties(path: Path) -> dict[str, Any]:
    sidecar = path.with_name("kernels.json")
    try:
        kernels = json.loads(sidecar.read_bytes())["kernels"]
        return next(kernel["properties"] for kernel in kernels if kernel["file"] == path.name)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        raise Hif4Error(f"{path}: {sidecar.name} beside it does not describe it; compile the artifact again.") from None


def _disassemble(path: Path) -> str:
    return _run("nvdisasm", "-c", "-ndf", str(path))


def _run(tool: str, *arguments: str) -> str:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise Hif4Error("reading CUDA binaries needs the tools in Triton's wheel; run `pip install triton`.")
    command = [str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / tool), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Hif4Error(f"{command[0]}: cannot be run ({error.strerror}); reinstall triton.") from None
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise Hif4Error(f"{arguments[-1]}: {tool} cannot read it ({lines[-1]}).")
    return result.stdout


def _amd_resources(path: Path) -> Resources:
    try:
        kernel = _amd_metadata(path.read_bytes())["amdhsa.kernels"][0]
        return Resources(
            kernel[".name"],
            kernel[".vgpr_count"],
            kernel[".vgpr_spill_count"] + kernel[".sgpr_spill_count"],
            kernel[".group_segment_fixed_size"],
        )
    except (OSError, LookupError, struct.error, TypeError, ValueError) as error:
        raise Hif4Error(f"{path}: is not an AMD binary with a kernel ({error}).") from None


def _amd_metadata(data: bytes) -> dict[str, Any]:
    """The metadata note of a code object (LLVM, User Guide for AMDGPU Backend, "Code Object V3 and Above Metadata")."""
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    table, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    for index in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", data, table + index * size)
        if kind != 4:  # PT_NOTE
            continue
        name_size, length, kind = struct.unpack_from("<III", data, offset)
        if kind == 32 and data[offset + 12 : offset + 18] == b"AMDGPU":
            start = offset + 12 + -(-name_size // 4) * 4
            value, _ = _unpack(data[start : start + length], 0)
            if isinstance(value, dict):
                return value
    raise ValueError("no metadata note")


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    """One MessagePack value at `at`, and where it ends; the kinds that metadata notes are made of."""
    kind = data[at]
    at += 1
    if kind < 0x80:
        return kind, at
    if kind < 0xC0:
        length, form = (kind & 0x1F, "text") if kind >= 0xA0 else (kind & 0x0F, "list" if kind >= 0x90 else "map")
    elif kind in (0xC2, 0xC3):
        return kind == 0xC3, at
    elif kind in (0xCC, 0xCD, 0xCE, 0xCF):
        width = 1 << (kind - 0xCC)
        return int.from_bytes(data[at : at + width], "big"), at + width
    elif kind in (0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF):
        form = "text" if kind < 0xDC else "list" if kind < 0xDE else "map"
        width = 1 << (kind - 0xD9) if kind < 0xDC else 2 << ((kind - 0xDC) & 1)
        length = int.from_bytes(data[at : at + width], "big")
        at += width
    else:
        raise ValueError(f"MessagePack kind {kind:#x}")
    if form == "text":
        return data[at : at + length].decode(), at + length
    items = []
    for _ in range(length * (2 if form == "map" else 1)):
        item, at = _unpack(data, at)
        items.append(item)
    return (dict(zip(items[::2], items[1::2], strict=True)) if form == "map" else items), at
