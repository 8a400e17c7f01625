"""A reader of artifacts, written from docs/artifact.md: the standard library and NumPy, nothing of torch or of hif4c.

It is the proof that the page is enough. What it computes is float32 in NumPy, with the roundings that the page names.
"""

import hashlib
import json
import mmap
import struct
from pathlib import Path

import numpy as np

DTYPES = {"U8": np.uint8, "I64": np.int64, "F16": np.float16, "BF16": np.uint16, "F32": np.float32, "F64": np.float64}


def read_manifest(root):
    """The manifest, whose digest is that of the file's bytes without the second line."""
    data = (root / "manifest.json").read_bytes()
    manifest = json.loads(data)
    first, second, *rest = data.split(b"\n")
    assert second == f'  "digest": "{manifest["digest"]}",'.encode()
    assert hashlib.sha256(b"\n".join([first, *rest])).hexdigest() == manifest["digest"]
    assert (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode() == data
    assert manifest["format"] == "hif4c-artifact"
    assert 1 <= manifest["format_version"] <= 3
    return manifest


def check_files(root, manifest):
    """Every file is listed with its size and hash, and every listed file is there."""
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert found == {"manifest.json", *manifest["files"]}
    for name, entry in manifest["files"].items():
        data = (root / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])


class Program:
    """graph.json with its tables looked up.

    `inputs` and `tensors`: name -> [dtype, sizes]. `nodes`: (target, args, kwargs, module, type), where a value of an
    argument is ("value", number) and a dtype ("dtype", name). Values are numbered inputs, tensors, nodes.
    """

    def __init__(self, path):
        raw = json.loads(path.read_bytes())
        assert raw["schema"] == 1
        self._types = raw["types"]
        self.inputs = {name: self._types[index] for name, index in raw["inputs"]}
        self.tensors = {name: self._types[index] for name, index in raw["tensors"]}
        self.names = [*self.inputs, *self.tensors]
        self.nodes = []
        for target, args, kwargs, module, kind in raw["nodes"]:
            number = len(self.names) + len(self.nodes)
            args = [self._argument(item, number) for item in args]
            kwargs = {name: self._argument(item, 0) for name, item in kwargs.items()}
            self.nodes.append((raw["targets"][target], args, kwargs, raw["modules"][module], self._type(kind)))
        self.outputs = raw["outputs"]

    def node(self, number):
        """The node whose value has this number."""
        return self.nodes[number - len(self.names)]

    def name(self, argument):
        """The name of the stored tensor that an argument is, None for null."""
        return None if argument is None else self.names[argument[1]]

    def _argument(self, value, number):
        if isinstance(value, list):
            return [self._argument(item, number) for item in value]
        if not isinstance(value, str):
            return value
        if value == "@":
            return ("device",)
        if value[0] == "%":
            assert 0 <= int(value[1:]) < number
            return ("value", int(value[1:]))
        return {"'": value[1:], ":": ("dtype", value[1:])}[value[0]]

    def _type(self, kind):
        if isinstance(kind, list):
            return [self._types[index] for index in kind]
        return self._types[kind] if isinstance(kind, int) else kind


class TensorFile:
    """A safetensors file."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack("<Q", self._map[:8])
        self._start = 8 + length
        self._header = json.loads(self._map[8 : self._start])
        assert self._start % 8 == 0
        assert self._header.pop("__metadata__") == {"format": "pt"}
        ends = [0, *(entry["data_offsets"][1] for entry in self._header.values())]
        assert [entry["data_offsets"][0] for entry in self._header.values()] == ends[:-1]
        assert self._start + ends[-1] == len(self._map)

    @property
    def names(self):
        return list(self._header)

    def dtype(self, name):
        return self._header[name]["dtype"]

    def shape(self, name):
        return self._header[name]["shape"]

    def read(self, name):
        """The tensor; bf16 as float32, which holds it exactly."""
        entry = self._header[name]
        begin, end = (self._start + offset for offset in entry["data_offsets"])
        array = np.frombuffer(self._map[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return from_bf16(array) if entry["dtype"] == "BF16" else array


def from_bf16(array):
    """float32 of the bits of bf16."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def to_bf16(array):
    """float32 rounded to bf16, half to even, as float32."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def in_unit_integers(codes, scales):
    """n [..., U, 64] of planes."""
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(*scales.shape[:-1], 64).astype(np.int32)
    bits = np.unpackbits(scales[..., 1:], axis=-1, bitorder="big").astype(np.int32)
    exponents = bits[..., :8].repeat(8, -1) + bits[..., 8:].repeat(4, -1)
    return np.where(nibbles & 8, -1, 1) * ((nibbles & 7) << exponents)


def unit_scales(scales):
    """E6M2 / 4 of every unit."""
    stored = scales[..., 0].astype(np.int32)
    value = np.ldexp(np.float32(1) + (stored & 3).astype(np.float32) / 4, (stored >> 2) - 48 - 2)
    return np.where(stored == 0xFF, np.float32("nan"), value)


def dequantize(codes, scales):
    """Values float32 [..., Kp], without the sign of zeros."""
    values = unit_scales(scales)[..., None] * in_unit_integers(codes, scales).astype(np.float32)
    return values.reshape(*codes.shape[:-1], -1)


def rotate(x, width):
    """The block rotation of x [..., K] in float32, in the order of operations of the page."""
    shape = x.shape
    stride = 1
    while stride < width:
        pairs = x.reshape(*shape[:-1], -1, 2, stride)
        x = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2)
        stride *= 2
    return x.reshape(shape) * np.float32(width**-0.5)


def quantize(x, mask=None, hadamard=0):
    """codes and scales of x float32 [..., K]."""
    x = x if mask is None else x * mask
    x = rotate(x, hadamard) if hadamard > 1 else x
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 64)])
    units = x.reshape(*x.shape[:-1], -1, 64)
    size = np.abs(units)
    v4 = size.reshape(*units.shape[:-1], 16, 4).max(-1)
    v8 = v4.reshape(*v4.shape[:-1], 8, 2).max(-1)
    scale = np.clip(to_bf16(v8.max(-1) * np.float32(0.142578125)), np.float32(2.0**-48), np.float32(49152))
    bits = scale.view(np.uint32)
    bits = (bits + (1 << 20) - 1 + (bits >> 21 & 1)) >> 21  # two fraction bits are left, half to even
    e6m2 = (bits << 21).astype(np.uint32).view(np.float32)
    r = to_bf16(np.float32(1) / e6m2)[..., None]
    a = v8 * r >= 4
    b = v4 * r * np.where(a, np.float32(0.5), np.float32(1)).repeat(2, -1) >= 2
    exponents = 2 - a.repeat(8, -1).astype(np.int32) - b.repeat(4, -1)
    q = np.minimum(np.floor(np.ldexp(size * r, exponents) + np.float32(0.5)), 7).astype(np.uint8)
    nibbles = q | (units < 0).astype(np.uint8) << 3
    codes = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).reshape(*x.shape[:-1], -1)
    first = (bits - ((127 - 48) << 2)).astype(np.uint8)[..., None]
    return codes, np.concatenate([first, np.packbits(a, -1), np.packbits(b, -1)], -1)


def linear(codes, scales, w_codes, w_scales, bias, side=None, side_weight=None):
    """One row of `hif4.linear`, float32 [N], before the activation: codes [Kp/2] and scales [U, 4] of the input."""
    dots = in_unit_integers(w_codes, w_scales) * in_unit_integers(codes, scales)
    products = dots.sum(-1).astype(np.float32) * (unit_scales(w_scales) * unit_scales(scales))
    return _epilogue([*products.T], bias, side, side_weight)


def linear_w4(x, w_codes, w_scales, bias, mask=None, hadamard=0, side=None, side_weight=None):
    """One row of `hif4.linear_w4`, float32 [N], before the activation: x bf16 [K] as float32."""
    if mask is not None or hadamard > 1:
        y = x if mask is None else x * mask
        x = to_bf16(rotate(y, hadamard) if hadamard > 1 else y)
    product = dequantize(w_codes, w_scales)[:, : len(x)] @ x
    return _epilogue([product], bias, side, side_weight)


def _epilogue(terms, bias, side, side_weight):
    total = np.zeros_like(terms[0])
    for term in terms:
        total = total + term
    for j in range(0 if side is None else len(side)):
        total = total + side[j] * side_weight[j]
    return total if bias is None else total + bias


def open_expert(root, expert, variant=None):
    """Program and tensors of an expert: name -> (file, name)."""
    program = Program(Path(root, expert, "graph.json" if variant is None else f"graph.{variant}.json"))
    tensors = {}
    for path in sorted(Path(root, expert).glob("*.safetensors")):
        file = TensorFile(path)
        tensors |= dict.fromkeys(file.names, file)
    return program, tensors
