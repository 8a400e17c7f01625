"""The registered hif4:: operators: results, fakes, schemas, dynamic export."""

import importlib
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hif4c.runtime import format as hif4_format
from hif4c.runtime import ops as hif4_ops
from hif4c.runtime import reference
from hif4c.runtime.errors import Hif4Error

pytestmark = pytest.mark.usefixtures("portable")

assert hif4_ops.NAMESPACE == "hif4"
hif4 = torch.ops.hif4


def data(k: int = 200) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 5, k, generator=g), torch.randn(12, k, generator=g)
    codes, scales = hif4_format.quantize(x)
    w_codes, w_scales = hif4_format.quantize(w)
    bias, mask = torch.randn(12, generator=g), torch.rand(k, generator=g)
    side, side_weight = torch.randn(2, 5, 3, generator=g), torch.randn(3, 12, generator=g)
    return {
        "x": x,
        "codes": codes,
        "scales": scales,
        "w_codes": w_codes,
        "w_scales": w_scales,
        "bias": bias,
        "mask": mask,
        "gate": torch.randn(2, 5, 12, generator=g),
        "residual": torch.randn(2, 5, 12, generator=g),
        "angle": torch.randn(1, 5, 1, 20, generator=g),
        "side": side.bfloat16(),
        "side_weight": side_weight.bfloat16(),
    }


def calls() -> list[tuple[torch._ops.OpOverload, tuple, dict]]:
    d = data()
    quantized = d["codes"], d["scales"], d["w_codes"], d["w_scales"]
    weight = d["w_codes"], d["w_scales"]
    branch = d["side"], d["side_weight"]
    return [
        (hif4.quantize.default, (d["x"],), {}),
        (hif4.quantize.default, (d["x"].bfloat16(), d["mask"], 8), {}),
        (hif4.dequantize.default, (d["codes"], d["scales"], 200), {}),
        (hif4.dequantize.default, (d["codes"], d["scales"], 200, torch.float64), {}),
        (hif4.linear.default, quantized, {}),
        (hif4.linear.default, (*quantized, d["bias"].bfloat16(), "gelu_tanh"), {}),
        (hif4.linear.default, (*quantized, d["bias"]), {"dtype": torch.float16}),
        (hif4.linear_w4.default, (d["x"].half(), *weight), {}),
        (hif4.linear_w4.default, (d["x"], *weight, d["bias"], d["mask"], 8, "gelu_tanh", torch.bfloat16), {}),
        (hif4.linear.default, (*quantized, d["bias"], None, torch.bfloat16, *branch), {}),
        (hif4.linear.default, quantized, {"side": branch[0].half(), "side_weight": branch[1].half()}),
        (hif4.linear_w4.default, (d["x"], *weight, None, None, 0, None, None, *branch), {}),
        (hif4.linear.default, quantized, {"gate": d["gate"], "residual": d["residual"]}),
        (hif4.linear_w4.default, (d["x"], *weight), {"gate": d["gate"][:, :1], "residual": d["residual"].half()}),
        (hif4.norm.default, (d["x"], None, None, d["x"][:, :1], d["x"][:, :1], 1e-6, torch.bfloat16), {}),
        (hif4.norm_quantize.default, (d["x"], d["mask"], d["mask"], None, None, 1e-6, torch.float16, d["mask"], 8), {}),
        (hif4.rms_rotary.default, (d["x"], d["mask"], 1e-6, 5), {}),
        (hif4.rms_rotary.default, (d["x"].bfloat16(), d["mask"], 1e-6, 5, d["angle"].cos(), d["angle"].sin()), {}),
        (hif4.attention.default, (d["x"].view(1, 2, 5, 200),) * 3, {}),
    ]


@pytest.mark.parametrize("index", range(19))
def test_opcheck(index: int):
    op, args, kwargs = calls()[index]
    torch.library.opcheck(op, args, kwargs)


def test_operators_are_the_functions():
    d = data()
    quantized = d["codes"], d["scales"], d["w_codes"], d["w_scales"]
    bias = d["bias"].bfloat16()
    got = hif4.quantize(d["x"], d["mask"], 8)
    assert all(map(torch.equal, got, hif4_format.quantize(d["x"], d["mask"], 8)))
    decoded = hif4.dequantize(d["codes"], d["scales"], 200)
    assert decoded.dtype == torch.bfloat16
    assert torch.equal(decoded, hif4_format.dequantize(d["codes"], d["scales"], 200))
    assert torch.equal(hif4.linear(*quantized, bias), reference.linear(*quantized, bias, None, torch.bfloat16))
    y = hif4.linear_w4(d["x"], *quantized[2:], bias, d["mask"], 8, "gelu_tanh")
    assert torch.equal(y, reference.linear_w4(d["x"], *quantized[2:], bias, d["mask"], 8, "gelu_tanh", torch.float32))
    branch = {name: d[name] for name in ("side", "side_weight")}
    assert torch.equal(hif4.linear(*quantized, **branch), reference.linear(*quantized, **branch))
    y = hif4.linear_w4(d["x"], *quantized[2:], **branch)
    assert torch.equal(y, reference.linear_w4(d["x"], *quantized[2:], **branch))


def test_output_dtype_defaults():
    d = data()
    quantized = d["codes"], d["scales"], d["w_codes"], d["w_scales"]
    assert hif4.linear(*quantized).dtype == torch.float32
    assert hif4.linear(*quantized, d["bias"].half()).dtype == torch.float16
    assert hif4.linear(*quantized, d["bias"].half(), None, torch.bfloat16).dtype == torch.bfloat16
    assert hif4.linear_w4(d["x"].bfloat16(), *quantized[2:], d["bias"]).dtype == torch.bfloat16


def test_fakes_refuse_what_the_operators_refuse():
    d = data()
    quantized = d["codes"], d["scales"], d["w_codes"], d["w_scales"]
    side, side_weight = d["side"], d["side_weight"]
    bad_branches = [
        (side, None), (side.half(), side_weight), (side[:1], side_weight), (side, side_weight[:2]),
        (side, side_weight[:, 1:]),
    ]  # fmt: skip
    bad_calls = [
        (hif4.quantize, (d["x"].double(),)),
        (hif4.quantize, (d["x"], d["mask"][1:])),
        (hif4.quantize, (d["x"], None, 16)),
        (hif4.quantize, (d["x"][..., :0],)),
        (hif4.dequantize, (d["codes"], d["scales"], 300)),
        (hif4.dequantize, (d["codes"], d["scales"], 200, torch.int8)),
        (hif4.linear, (d["codes"][..., 32:], d["scales"][..., 1:, :], d["w_codes"], d["w_scales"])),
        (hif4.linear, (d["codes"], d["scales"], d["w_codes"], d["w_scales"], d["bias"], "relu")),
        (hif4.linear, (d["codes"], d["scales"], d["w_codes"], d["w_scales"], d["bias"][1:])),
        (hif4.linear_w4, (d["x"][..., :64], d["w_codes"], d["w_scales"])),
        *((hif4.linear, (*quantized, None, None, None, *branch)) for branch in bad_branches),
        *((hif4.linear_w4, (d["x"], *quantized[2:], None, None, 0, None, None, *branch)) for branch in bad_branches),
    ]
    for op, args in bad_calls:
        with pytest.raises(Hif4Error) as real:
            op(*args)
        with FakeTensorMode() as mode:
            fake_args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            with pytest.raises(Hif4Error) as fake:
                op(*fake_args)
        assert str(fake.value) == str(real.value)


class Block(torch.nn.Module):
    """Each operator, the linears with and without a side branch, on an input [batch, frames, K]."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in data().items():
            if name not in ("x", "codes", "scales", "side"):
                self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codes, scales = hif4.quantize(x, self.mask, 8)
        decoded = hif4.dequantize(codes, scales, x.shape[-1], torch.float32)
        y = hif4.linear(codes, scales, self.w_codes, self.w_scales, self.bias, "gelu_tanh")
        y4 = hif4.linear_w4(x, self.w_codes, self.w_scales, self.bias)
        branch = {"side": x[..., :3].bfloat16(), "side_weight": self.side_weight}
        z = hif4.linear(codes, scales, self.w_codes, self.w_scales, **branch)
        return decoded, y, y4, z, hif4.linear_w4(x, self.w_codes, self.w_scales, **branch)


def test_export_with_dynamic_shapes():
    dynamic = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("frames")}}
    program = torch.export.export(Block(), (data()["x"],), dynamic_shapes=dynamic)
    targets = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("hif4")]
    assert targets == [
        "hif4.quantize.default",
        "hif4.dequantize.default",
        "hif4.linear.default",
        "hif4.linear_w4.default",
        "hif4.linear.default",
        "hif4.linear_w4.default",
    ]
    x = torch.randn(3, 7, 200, generator=torch.Generator().manual_seed(1))
    for got, expected in zip(program.module()(x), Block()(x), strict=True):
        assert torch.equal(got, expected)


def test_fake_shapes_stay_symbolic_in_every_dimension():
    def decode(x: torch.Tensor) -> torch.Tensor:
        codes, scales = hif4.quantize(x)
        return hif4.dequantize(codes, scales, x.shape[1])

    dynamic = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    module = torch.nn.Module()
    module.forward = decode
    program = torch.export.export(module, (torch.randn(4, 130),), dynamic_shapes=dynamic)
    x = torch.randn(3, 300)
    assert torch.equal(program.module()(x), decode(x))


def test_a_second_import_is_harmless(monkeypatch: pytest.MonkeyPatch):
    importlib.reload(hif4_ops)
    monkeypatch.delitem(sys.modules, "hif4c.runtime.ops")
    importlib.import_module("hif4c.runtime.ops")
    assert hif4.quantize(torch.zeros(64))[1].tolist() == [[0, 0, 0, 0]]


def test_parameters_that_require_grad_are_accepted():
    d = data()
    bias = torch.nn.Parameter(d["bias"])
    with torch.no_grad():
        expected = hif4.linear(d["codes"], d["scales"], d["w_codes"], d["w_scales"], d["bias"])
    assert torch.equal(hif4.linear(d["codes"], d["scales"], d["w_codes"], d["w_scales"], bias), expected)
