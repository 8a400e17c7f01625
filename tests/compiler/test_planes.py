import hashlib
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hif4c.compiler import checkpoint as checkpoint_module
from hif4c.compiler import planes as planes_module
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.planes import InputStatistics, make_planes, pack_tensors, prepared_weight
from hif4c.passes.program import Program, TensorSource, inverse_mask
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import quantize
from hif4c.runtime.placed_writer import PlacedWriter
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorSpec

N, K = 300, 128
GENERATOR = torch.Generator().manual_seed(3)
MASKS = {
    "columns": 2.0 ** torch.randn(K, generator=GENERATOR),
    "outliers": (2.0 ** torch.randn(K, generator=GENERATOR)).index_fill(0, torch.tensor([5, 77]), 0.0),
    "rows": 2.0 ** torch.randn(N, generator=GENERATOR),
}
ENERGY = InputStatistics(torch.rand(K, generator=GENERATOR) + 0.1, 100)
KINDS = {
    "nearest": {},
    "rotated": {"hadamard": 64, "mask": "columns"},
    "rows": {"row_mask": "rows", "mask": "columns"},
    "outliers": {"mask": "outliers", "hadamard": 128},
    "low-rank": {"mask": "outliers", "rank": 4, "hadamard": 64},
    "search": {"mask": "columns", "rounding": "search"},
    "stored": {},
}


def sources_of(name: str, kind: str) -> list[TensorSource]:
    options = KINDS[kind]
    rank, outliers = options.get("rank", 0), 2 if options.get("mask") == "outliers" else 0
    shapes = {"codes": (N, K // 2), "scales": (N, K // 64, 4)}
    if rank:
        shapes["down"] = (rank, K)
    if rank + outliers:
        shapes["up"] = (rank + outliers, N)
    return [
        TensorSource(
            f"{name}.{plane}", torch.uint8 if plane in ("codes", "scales") else torch.bfloat16, shape, source=name,
            plane=plane, packed_from=torch.bfloat16, **options,
        )
        for plane, shape in shapes.items()
    ]  # fmt: skip


@pytest.fixture
def model(tmp_path, monkeypatch):
    """(program, groups, checkpoint, tensors): a weight of every kind, a norm, a constant; blocks of a few rows."""
    monkeypatch.setattr(planes_module, "MAPPED_ELEMENTS", 100 * K)
    monkeypatch.setattr(planes_module, "SEARCHED_ELEMENTS", 100 * K)
    monkeypatch.setattr(planes_module, "FACTORED_ELEMENTS", 90 * K)
    monkeypatch.setattr(planes_module.PreparedWeight.blocks, "__defaults__", (70 * K,))
    monkeypatch.setattr(checkpoint_module, "_PIECE_BYTES", 4096)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"blocks.0.{kind}.weight": torch.randn(N, K, generator=generator).to(
            torch.float32 if kind == "search" else torch.bfloat16
        )
        for kind in KINDS
    }
    tensors["blocks.0.norm2.weight"] = torch.randn(K, generator=generator)
    return open_model(tmp_path, tensors)


def open_model(folder, tensors):
    write_checkpoint(folder, tensors)
    groups = [sources_of(name, name.split(".")[2]) for name in tensors if "norm2" not in name]
    groups.append([TensorSource("blocks.0.norm2.weight", torch.float32, (K,), source="blocks.0.norm2.weight")])
    groups.append([TensorSource("constant", torch.float32, (3,), value=torch.arange(3.0))])
    program = Program(fx.Graph(), {}, [], FakeTensorMode(), masks=MASKS)
    return program, groups, Checkpoint(folder), tensors


def write_checkpoint(folder, tensors):
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with StreamingWriter(folder, specs, base_name="diffusion_pytorch_model") as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def solved(name):
    planes = {"codes": torch.ones(N, K // 2).byte(), "scales": torch.ones(N, K // 64, 4).byte()}
    return planes if "stored" in name else None


def energy(source):
    return ENERGY


@pytest.mark.parametrize("threads", [1, 4])
def test_the_stored_form_of_everything(model, threads):
    """The same bits whatever the number of threads, and those of `make_planes` with one; digests; measurements."""
    program, groups, checkpoint, tensors = model
    before = torch.get_num_threads()
    measured = []

    def measure(source, weight, planes):
        measured.append(source.source)
        assert weight.shape == (N, K)
        return float(planes["codes"].float().mean())

    torch.set_num_threads(threads)
    try:
        packed = list(pack_tensors(groups, program, checkpoint, solved=solved, statistics=energy, measure=measure))
        torch.set_num_threads(1)
        for result, sources in zip(packed, groups, strict=True):
            assert result.source == sources[0].source
            assert list(result.stored) == [source.name for source in sources]
            assert all(
                value.shape == source.shape for value, source in zip(result.stored.values(), sources, strict=True)
            )
            if result.source is None:
                assert (result.digest, result.nbytes, result.sqnr) == (None, 0, None)
                assert torch.equal(result.stored["constant"], torch.arange(3.0))
                continue
            tensor = tensors[result.source]
            assert result.digest == hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
            assert result.nbytes == tensor.nbytes
            if sources[0].plane == "whole":
                assert torch.equal(result.stored[sources[0].name], tensor)
                assert result.sqnr is None
                continue
            planes = solved(result.source) or make_planes(sources[0], tensor, program, ENERGY)
            assert planes.keys() == {source.plane for source in sources}
            assert all(torch.equal(result.stored[source.name], planes[source.plane]) for source in sources)
            assert result.sqnr == float(planes["codes"].float().mean())
    finally:
        torch.set_num_threads(before)
    assert Counter(measured) == dict.fromkeys((name for name in tensors if "norm2" not in name), 1)


@pytest.mark.parametrize("kind", ["nearest", "rotated", "rows", "outliers"])
def test_blocks_of_rows_are_the_rows_of_the_whole(model, kind):
    """Plain rounding against the format's own definition, of the whole weight at once."""
    program, _, checkpoint, tensors = model
    source = sources_of(f"blocks.0.{kind}.weight", kind)[0]
    tensor = tensors[str(source.source)]
    planes = make_planes(source, checkpoint.read(str(source.source)), program)
    weight = tensor.float() * MASKS["rows"][:, None] if source.row_mask else tensor.float()
    inverse = inverse_mask(MASKS[source.mask]) if source.mask else torch.ones(K)
    codes, scales = quantize(weight * inverse, None, source.hadamard)
    assert torch.equal(planes["codes"], codes)
    assert torch.equal(planes["scales"], scales)
    assert torch.equal(prepared_weight(source, tensor, program)[:], weight)


def test_a_weight_that_is_not_finite_is_an_error_at_its_turn(tmp_path):
    tensors = {f"blocks.0.{kind}.weight": torch.randn(N, K).bfloat16() for kind in ("nearest", "rotated", "rows")}
    tensors["blocks.0.rotated.weight"][-1, -1] = torch.nan
    tensors["blocks.0.norm2.weight"] = torch.ones(K)
    program, groups, checkpoint, _ = open_model(tmp_path, tensors)
    packed = pack_tensors(groups, program, checkpoint)
    assert next(packed).source == "blocks.0.nearest.weight"
    with pytest.raises(Hif4Error, match=r"blocks\.0\.rotated\.weight holds NaN or infinite values"):
        next(packed)


def test_a_caller_that_stops_early_leaves_no_threads(model):
    program, groups, checkpoint, _ = model
    before = torch.get_num_threads()
    packed = pack_tensors(groups, program, checkpoint, solved=solved, statistics=energy)
    next(packed)
    packed.close()
    assert torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read as Linux shows it")
@pytest.mark.slow
def test_memory_at_full_width(tmp_path):
    """Halves of feed-forward weights of A14B with masks and the measurement: 71 MB each, and 142 MB in float32."""
    # Reserved and never written: weights of zeros without a byte that the disk must carry.
    listed = [TensorSpec(f"blocks.{number}.ffn.net.2.weight", torch.bfloat16, (2560, 13824)) for number in range(3)]
    with PlacedWriter(tmp_path, listed, base_name="diffusion_pytorch_model") as writer:
        writer.create()
    script = (
        "import sys, torch\n"
        "from torch import fx\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from hif4c.compiler.checkpoint import Checkpoint\n"
        "from hif4c.compiler.linear_error import linear_sqnr\n"
        "from hif4c.compiler.planes import pack_tensors\n"
        "from hif4c.passes.program import Decision, Precision, Program, TensorSource\n"
        "from hif4c.runtime.native import native_kernels\n"
        "def peak():\n"
        "    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) >> 10\n"
        "mask, rows = torch.linspace(0.5, 2, 13824), torch.randn(16, 13824)\n"
        "program = Program(fx.Graph(), {}, [], FakeTensorMode(), masks={'m': mask})\n"
        "decision = Decision('l', Precision.W4A4, 'test', mask='m', hadamard=64)\n"
        "groups = [[TensorSource(f'{n}.{p}', torch.uint8, s, source=n, plane=p, mask='m', hadamard=64,\n"
        "                        packed_from=torch.bfloat16)\n"
        "           for p, s in (('codes', (2560, 6912)), ('scales', (2560, 216, 4)))]\n"
        "          for n in (f'blocks.{i}.ffn.net.2.weight' for i in range(3))]\n"
        "measure = lambda source, weight, planes: linear_sqnr(decision, rows, weight, planes, mask)\n"
        "with native_kernels(), Checkpoint(sys.argv[1]) as checkpoint:\n"
        "    linear_sqnr(decision, rows, torch.randn(64, 13824),\n"
        "                dict(zip(('codes', 'scales'), torch.ops.hif4.quantize(torch.randn(64, 13824)))), mask)\n"
        "    before = peak()\n"
        "    found = [packed.sqnr for packed in pack_tensors(groups, program, checkpoint, measure=measure)]\n"
        "print(len(found), peak() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    count, grown = map(int, run.stdout.split())
    assert count == 3
    # Planes of 20 MB each, and for each of three threads 60 MB of buffers: 240 MB; with whole weights in float32 for
    # each thread it would be 300 MB more than the planes.
    assert grown < 320, grown
