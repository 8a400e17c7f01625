"""What is read from GPU binaries, on texts and bytes made by hand; test_gpu_kernels.py has real binaries."""

import json
import struct
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hif4c.compiler import binary_report
from hif4c.compiler.binary_report import Resources, analyse, loop_of_amdgcn, loop_of_sass, resources
from hif4c.runtime.errors import Hif4Error


def sass(*lines: str) -> str:
    """What nvdisasm prints: labels stand alone, instructions after their address."""
    return "\n".join(
        line if line.startswith(".L") else f"        /*{16 * index:04x}*/                   {line} ;"
        for index, line in enumerate(lines)
    )


SPILLING = sass(
    "STL [R1], R2",
    ".L_x_0:",
    "LDSM.16.M88.4 R4, [R2]",
    "IMMA.16832.S8.S8.SAT R8, R4.ROW, R6.COL, R8",
    "@P1 LDL R3, [R1]",
    "IMMA.16832.S8.S8.SAT R12, R4.ROW, R6.COL, R8",
    "@!UP0 STL [R1], R3",
    "@P0 BRA `(.L_x_0)",
    "EXIT",
)


def test_spills_are_counted_inside_the_loop_and_outside() -> None:
    instructions, loop = loop_of_sass(SPILLING)
    assert len(instructions) == 8
    assert loop is not None
    assert (loop.instructions, loop.matrix_count, loop.matrix_instruction) == (6, 2, "IMMA.16832.S8.S8.SAT")
    assert loop.spills == 2
    assert loop.opcodes == {"IMMA": 2, "BRA": 1, "LDL": 1, "LDSM": 1, "STL": 1}


def test_main_loop_is_the_innermost_with_the_most_matrix_instructions() -> None:
    text = sass(
        ".L_x_0:",  # around everything: where cold code at the end returns to
        "NOP",
        ".L_x_1:",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0",
        "@P0 BRA `(.L_x_1)",
        ".L_x_2:",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0",
        "FADD R1, R1, R1",
        "@P0 BRA `(.L_x_2)",
        ".L_x_3:",
        "SYNCS.PHASECHK R1",
        "@P0 BRA `(.L_x_3)",
        "BRA `(.L_x_4)",
        ".L_x_4:",
        "BRA `(.L_x_0)",
    )
    loop = loop_of_sass(text)[1]
    assert loop is not None
    assert (loop.instructions, loop.matrix_count) == (3, 2)


def test_a_kernel_without_matrix_instructions_has_no_main_loop() -> None:
    text = sass(".L_x_0:", "FADD R1, R1, R1", "@P0 BRA `(.L_x_0)", "EXIT")
    assert loop_of_sass(text)[1] is None


@pytest.mark.parametrize("opcode", ["UTCHMMA", "UTCIMMA", "HMMA.16816.F32.BF16", "IGMMA.64x128x32.S8.S8"])
def test_matrix_instructions_are_known(opcode: str) -> None:
    loop = loop_of_sass(sass(".L_x_0:", f"@UP1 {opcode} R1", "@P0 BRA `(.L_x_0)"))[1]
    assert loop is not None
    assert loop.matrix_instruction == opcode


def test_amdgcn_loop() -> None:
    text = """
\t.text
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx4 v[2:5], v[0:1], off
\tscratch_store_dword off, v7, s0         ; 4-byte Folded Spill
\tv_mfma_i32_32x32x16_i8 v[2:17], v[144:145], v[136:137], v[34:49]
\tscratch_load_dword v7, off, s0          ; 4-byte Folded Reload
\t; a remark
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\tv_mfma_f32_32x32x8_bf16 v[2:17], v[144:145], v[136:137], v[34:49]
\ts_endpgm
"""
    loop = loop_of_amdgcn(text)
    assert loop is not None
    assert (loop.instructions, loop.matrix_count, loop.spills) == (5, 1, 2)
    assert loop.matrix_instruction == "v_mfma_i32_32x32x16_i8"


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [
        (128, 8, 32768, 2),  # registers: 65536 / (128 * 256)
        (129, 8, 32768, 1),  # 129 are handed out as 136
        (32, 8, 0, 8),  # 64 warps
        (32, 1, 0, 32),  # blocks
        (32, 4, 65536, 2),  # shared memory: 164 KB, each block with 1 KB of the system's
    ],
)
def test_blocks_that_fit_a_multiprocessor(registers: int, warps: int, shared: int, blocks: int) -> None:
    machine = binary_report._MACHINES["cuda-sm80"]
    assert binary_report._blocks(machine, Resources("k", registers, 0, 0), shared, warps, 32) == blocks


def pack(value: Any) -> bytes:
    """MessagePack, as LLVM writes it."""
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return bytes([value]) if value < 128 else b"\xcd" + value.to_bytes(2, "big")
    if isinstance(value, str):
        data = value.encode()
        return (bytes([0xA0 | len(data)]) if len(data) < 32 else bytes([0xD9, len(data)])) + data
    if isinstance(value, list):
        return bytes([0x90 | len(value)]) + b"".join(map(pack, value))
    head = bytes([0x80 | len(value)]) if len(value) < 16 else b"\xde" + len(value).to_bytes(2, "big")
    return head + b"".join(pack(key) + pack(item) for key, item in value.items())


def code_object(metadata: dict[str, Any]) -> bytes:
    """An ELF file that has nothing but the note."""
    body = pack(metadata)
    note = struct.pack("<III", 7, len(body), 32) + b"AMDGPU\0\0" + body
    header = b"\x7fELF\x02" + bytes(27) + struct.pack("<QQIHHHHHH", 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(note), len(note), 4) + note


KERNEL = {
    ".name": "linear_int8_with_a_name_that_is_long",
    ".vgpr_count": 158,
    ".vgpr_spill_count": 3,
    ".sgpr_spill_count": 4,
    ".group_segment_fixed_size": 4096,
    **{f".other{index}": True for index in range(12)},
}


def test_amd_resources(tmp_path: Path) -> None:
    path = tmp_path / "k.hsaco"
    path.write_bytes(code_object({"amdhsa.kernels": [KERNEL]}))
    assert resources(path, "hip-gfx942") == Resources("linear_int8_with_a_name_that_is_long", 158, 7, 4096)


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x02", b"text", code_object({"amdhsa.kernels": []})])
def test_what_is_no_amd_binary_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "k.hsaco"
    path.write_bytes(data)
    with pytest.raises(Hif4Error, match=r"k\.hsaco: is not an AMD binary"):
        resources(path, "hip-gfx942")


def test_what_is_no_cuda_binary_is_named(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "k.cubin"
    path.write_bytes(b"text")
    with pytest.raises(Hif4Error, match=r"k\.cubin: "):
        resources(path, "cuda-sm80")


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "k.cubin"
    with pytest.raises(Hif4Error, match="no GPU binaries for cpu"):
        analyse(path, "cpu")
    with pytest.raises(Hif4Error, match="compile the artifact again"):
        analyse(path, "cuda-sm80")
    (tmp_path / "kernels.json").write_text(json.dumps({"kernels": []}))
    with pytest.raises(Hif4Error, match="compile the artifact again"):
        analyse(path, "cuda-sm80")
    with (
        mock.patch.object(binary_report.importlib.util, "find_spec", return_value=None),
        pytest.raises(Hif4Error, match="pip install triton"),
    ):
        resources(path, "cuda-sm80")
