"""The operators of a GPU on Triton's interpreter, compared with the portable ones: a script for a process of its own.

    TRITON_INTERPRET=1 python gpu_interpreted.py

Prints a JSON object: case -> None, or what is wrong. Triton reads the variable when it is imported, and other tests
need a Triton that compiles.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from hif4c.runtime import format as hif4_format
from hif4c.runtime import reference
from hif4c.runtime.gpu import operators as operators_module
from hif4c.runtime.gpu.jit import Jit
from hif4c.runtime.gpu.operators import Operators
from hif4c.runtime.gpu.tuning import Candidate, Tuner
from tests.support.gpu_tuners import Picked

BATCH, TOKENS, K, N, S = 2, 35, 200, 96, 20  # tails in rows, channels, outputs and side branch
CASES: dict[str, Callable[[], str | None]] = {}


def case(name: str) -> Callable[[Callable[[], str | None]], Callable[[], str | None]]:
    def add(function: Callable[[], str | None]) -> Callable[[], str | None]:
        CASES[name] = function
        return function

    return add


def operators(prefix: str = "") -> Operators:
    return Operators(Jit(), lambda device: Picked(prefix))


def data(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": randn(BATCH, TOKENS, K).bfloat16(),
        "weight": randn(N, K) / K**0.5,
        "mask": randn(K).abs() + 0.5,
        "bias": randn(N),
        "side": randn(BATCH, TOKENS, S).bfloat16(),
        "side_weight": randn(S, N).bfloat16(),
        "modulation": randn(BATCH, 6, N),
        "token_gate": randn(BATCH, TOKENS, N),
        "residual": randn(BATCH, TOKENS, N).bfloat16(),
    }


def epilogues() -> dict[str, dict[str, Any]]:
    d = data()
    side = {"side": d["side"], "side_weight": d["side_weight"]}
    gate, bf16 = d["modulation"][:, 2:3], torch.bfloat16
    return {
        "plain": {},
        "bias": {"bias": d["bias"].bfloat16()},
        "gelu": {"bias": d["bias"], "activation": "gelu_tanh"},
        "gated": {"bias": d["bias"], "gate": gate, "residual": d["residual"], "dtype": bf16},
        "gated by token": {"gate": d["token_gate"], "residual": d["residual"].float(), "dtype": torch.float32},
        "one gate for all": {"gate": gate[:1], "residual": d["residual"], "dtype": bf16},
        "one gate for each place": {"gate": d["token_gate"][:1], "residual": d["residual"], "dtype": bf16},
        "residual": {"residual": d["residual"], "dtype": bf16},
        "gate": {"gate": gate, "dtype": bf16},
        "side": {"bias": d["bias"], **side},
        "side in fp16": {key: value.half() for key, value in side.items()},
        "all": {"bias": d["bias"], "activation": "gelu_tanh", **side, "gate": gate, "residual": d["residual"]},
        "fp16": {"bias": d["bias"], "dtype": torch.float16},
    }


def compare_linear(found: torch.Tensor, name: str, planes: Sequence[torch.Tensor], exact: bool) -> str | None:
    """With the portable linear; `exact`: the sums are in its order, so fp32 results without GELU have its bits."""
    arguments = {"dtype": None, **epilogues()[name]}
    bias = arguments.get("bias")
    arguments["dtype"] = arguments["dtype"] or (torch.float32 if bias is None else bias.dtype)
    expected = reference.linear(*planes, **arguments)
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"{found.dtype} {list(found.shape)} instead of {expected.dtype} {list(expected.shape)}"
    if exact and "side" not in name and name not in ("gelu", "all"):
        return None if torch.equal(found, expected) else f"off by {(found - expected).abs().max()}"
    # fp32 sums of K products in another order: at most K * 2^-24 of the sum of magnitudes, here below 64; GELU and gate
    # (below 5) pass an error on, at most five times as large. Then half a unit in the last place of the output's dtype.
    last = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[found.dtype]
    allowed = 5 * 64 * K * 2.0**-24 + last * 2 * expected.float().abs()
    off = (found.float() - expected.float()).abs() - allowed
    return None if bool((off <= 0).all()) else f"off by {(found.float() - expected.float()).abs().max()}"


def add_linears() -> None:
    plans = {
        "linear_int8 128x128_w8_s3": list(epilogues()),
        "linear_bf16 128x128_w8_s3": ["plain", "gelu", "gated", "side"],
        "linear_bf16 packed_128x128_w8_s3": ["plain", "gated"],
        "library": ["plain", "gated", "gated by token", "gate", "side in fp16", "all", "fp16"],
    }
    for prefix, names in plans.items():
        for name in names:

            def run(prefix: str = prefix, name: str = name) -> str | None:
                d = data()
                planes = (*hif4_format.quantize(d["x"]), *hif4_format.quantize(d["weight"]))
                found = operators(prefix).linear(*planes, **epilogues()[name])
                return compare_linear(found, name, planes, exact=prefix.startswith("linear_int8"))

            CASES[f"linear, {prefix}, {name}"] = run


@case("linear, in blocks of rows")
def linear_in_blocks() -> str | None:
    """Activations that are expanded in parts."""
    d = data()
    planes = (*hif4_format.quantize(d["x"]), *hif4_format.quantize(d["weight"]))
    before = operators_module._ROW_ELEMENTS
    operators_module._ROW_ELEMENTS = 24 * 256  # 24 rows of 256 channels
    try:
        for name in ("gated", "side"):
            found = operators("linear_int8 64x128").linear(*planes, **epilogues()[name])
            if wrong := compare_linear(found, name, planes, exact=True):
                return f"{name}: {wrong}"
    finally:
        operators_module._ROW_ELEMENTS = before
    return None


@case("linear, NaN and a single row")
def linear_nan() -> str | None:
    d = data()
    x = d["x"][:1, :1].clone()
    weight = d["weight"].clone()
    weight[5, 70] = torch.nan
    planes = (*hif4_format.quantize(x), *hif4_format.quantize(weight))
    for prefix in ("linear_int8", "linear_bf16 128", "linear_bf16 packed", "library"):
        found = operators(prefix).linear(*planes)
        if found.isnan().nonzero().tolist() != [[0, 0, 5]]:
            return f"{prefix}: NaN at {found.isnan().nonzero().tolist()}"
    x[0, 0, 100] = torch.inf
    planes = (*hif4_format.quantize(x), *planes[2:])
    if not operators("linear_int8").linear(*planes).isnan().all():
        return "an infinite input did not make its row NaN"
    return None


@case("linear, every candidate through the tuner")
def linear_tuned() -> str | None:
    names = []

    class Recorded(Tuner):
        def choose(self, key: str, candidates: Sequence[Candidate], *rest: Any, **named: Any) -> Candidate:
            names.extend(candidate.name for candidate in candidates)
            return super().choose(key, candidates, *rest, **named)

    def measure(run: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    d = data()
    planes = (*hif4_format.quantize(d["x"][:, :4, :64]), *hif4_format.quantize(d["weight"][:16, :64]))
    tuner = Recorded(["interpreter"], measure, None)
    tuned = Operators(Jit(), lambda device: tuner)
    expected = reference.linear(*planes)
    for _ in range(2):
        if (tuned.linear(*planes) - expected).abs().max() > 64 * 64 * 2.0**-24:  # as in compare_linear
            return "wrong"
    kinds = {name.split()[0] for name in names}
    if kinds != {"linear_int8", "linear_bf16", "library"} or len(names) != 9 or len(set(names)) != 9:
        return f"candidates {names}"
    return None


def add_weight_only() -> None:
    def run(prefix: str, settings: dict[str, Any], name: str) -> str | None:
        d = data()
        planes = hif4_format.quantize(d["weight"])
        arguments = {**settings, **epilogues()[name]}
        found = operators(prefix).linear_w4(d["x"], *planes, **arguments)
        expected = reference.linear_w4(d["x"], *planes, **{"dtype": torch.bfloat16, **arguments})
        difference = (found.float() - expected.float()).abs()
        allowed = 5 * 64 * K * 2.0**-24 + 2.0**-7 * expected.float().abs()  # as in compare_linear
        return None if found.dtype == expected.dtype and bool((difference <= allowed).all()) else str(difference.max())

    rotated = {"mask": data()["mask"], "hadamard": 8}
    for prefix in ("linear_bf16 128x128", "linear_bf16 packed_128x128", "library"):
        CASES[f"linear_w4, {prefix}"] = lambda prefix=prefix: run(prefix, rotated, "gated")
    CASES["linear_w4, library, all"] = lambda: run("library", {}, "all")


def add_quantize() -> None:
    x, mask = data()["x"], data()["mask"]
    wide = torch.randn(9, 256, generator=torch.Generator().manual_seed(1))
    cases: dict[str, tuple[Any, ...]] = {
        "bf16": (x,),
        "mask": (x, mask),
        "mask in bf16": (x, mask.bfloat16()),
        "fp16": (x.half(), mask),
        "fp32": (x.float(), mask),
        "narrow rotation": (x, mask, 8),
        "rotation of a unit": (wide.bfloat16(), None, 64),
        "wide rotation": (wide, wide[0].abs(), 256),
        "rows apart": (wide[:, :128], None, 64),
        "columns apart": (wide.t()[:64, :].t(), None),
        "not aligned": (wide.flatten()[1:1793].view(7, 256),),
        "one row": (x[0, 0],),
        "no rows": (x[:0],),
        "NaN and infinity": (torch.tensor([[torch.nan, *[1.0] * 127], [torch.inf, *[2.0] * 127]]),),
    }
    for name, arguments in cases.items():

        def run(arguments: tuple[Any, ...] = arguments) -> str | None:
            found, expected = operators().quantize(*arguments), hif4_format.quantize(*arguments)
            return None if all(map(torch.equal, found, expected)) else "other bits"

        CASES[f"quantize, {name}"] = run


def add_norm_quantize() -> None:
    from hif4c.runtime import rows

    d = data()
    x, mask, bf16 = d["x"], d["mask"], torch.bfloat16
    generator = torch.Generator().manual_seed(2)
    modulation = torch.randn(BATCH, 6, K, generator=generator) / 4
    one, both = modulation[:, :1], modulation[:, 1:2]
    by_token = torch.randn(2, BATCH, TOKENS, K, generator=generator)
    wide = torch.randn(BATCH, TOKENS, 256, generator=generator).bfloat16()
    cases: dict[str, tuple[Any, ...]] = {
        "modulation": (x, None, None, one, both, 1e-6, bf16),
        "modulation by token": (x, None, None, *by_token, 1e-6, bf16, mask, 8),
        "one modulation for all": (x, None, None, one[:1], both[:1], 1e-6, bf16, mask),
        "its own weights": (x, d["mask"], d["mask"] - 1, None, None, 1e-5, bf16),
        "no weights": (wide, None, None, None, None, 1e-6, bf16, None, 64),
        "wide rotation": (wide, None, None, None, None, 1e-6, bf16, wide[0, 0].abs().float(), 256),
        "both": (x, mask, mask, one, both, 1e-6, bf16),
        "fp32": (x.float(), None, None, one, both, 1e-6, torch.float32),
        "fp32 in, bf16 out": (x.float() + 100, None, None, one, both, 1e-6, bf16),
    }
    for name, arguments in cases.items():
        # What one kernel computes may differ by the order of its sums: nothing differed in these, so little may.
        for prefix in ("", "separate"):

            def run(arguments: tuple[Any, ...] = arguments, prefix: str = prefix) -> str | None:
                class Chosen(Picked):
                    def choose(self, key: str, candidates: Sequence[Candidate], *rest: Any) -> Candidate:
                        self.prefix = prefix if key.startswith("norm_quantize") else ""
                        return super().choose(key, candidates, *rest)

                found = Operators(Jit(), lambda device: Chosen()).norm_quantize(*arguments)
                expected = rows.norm_quantize(*arguments)
                differ = sum(int((a != b).sum()) for a, b in zip(found, expected, strict=True))
                return None if differ <= (0 if prefix else 3) else f"{differ} bytes differ"

            CASES[f"norm_quantize, {name}, {prefix or 'kernel'}"] = run


def main() -> None:
    add_quantize()
    add_linears()
    add_weight_only()
    add_norm_quantize()
    results: dict[str, str | None] = {}
    for name, function in CASES.items():
        try:
            results[name] = function()
        except Exception:  # noqa: BLE001 - the test that asked shows it
            results[name] = traceback.format_exc()
    print(json.dumps(results))  # noqa: T201 - read by the test


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
