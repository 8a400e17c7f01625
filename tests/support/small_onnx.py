"""A small .onnx file with hif4c's metadata and its weights in a file beside it, made by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

__all__ = ["CONFIG", "MODEL", "write_small_onnx"]

CONFIG = {"in_channels": 3, "out_channels": 3, "patch_size": [1, 2, 2], "rope_max_seq_len": 16, "text_dim": 5}

MODEL = {"experts": ["transformer"], "pipeline_class": "WanPipeline", "sampling": None, "source": "small"}


def write_small_onnx(path: Path, *, factor: float = 2.0, change: Any = None, **metadata: Any) -> Path:
    """sample = hidden_states * weight + timestep of the first sample + mean of the text; weight [C] is `factor`.

    Args:
        path: the .onnx file; its weights go into the file of the same stem that ends in .bin, behind 64 other bytes.
        factor: what is in the weights.
        change: called with the model before it is written.
        metadata: entries instead of the usual ones.
    """
    data = path.with_suffix(".bin")
    data.write_bytes(bytes(64) + np.full((3, 1, 1, 1), factor, np.float32).tobytes())
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[3, 1, 1, 1])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", data.name), ("offset", "64"), ("length", "12")):
        weight.external_data.add(key=key, value=value)
    sizes = {"hidden_states": ["b", 3, "f", "h", "w"], "timestep": ["b"], "encoder_hidden_states": ["b", "t", 5]}
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["hidden_states", "weight"], ["scaled"]),
            helper.make_node("ReduceMax", ["timestep"], ["t"], keepdims=0),
            helper.make_node("Add", ["scaled", "t"], ["shifted"]),
            helper.make_node("ReduceMean", ["encoder_hidden_states"], ["text"], keepdims=0),
            helper.make_node("Add", ["shifted", "text"], ["sample"]),
        ],
        "small",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in sizes.items()],
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, sizes["hidden_states"])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    values = {
        "expert": "transformer", "variant": None, "config": CONFIG, "expand_timesteps": False, "bf16_timesteps": [],
        "model": MODEL, "digest": "0" * 64, "form": "lean", "opset": 20, "data": [],
    } | metadata  # fmt: skip
    helper.set_model_props(model, {"hif4c": json.dumps(values)})
    if change is not None:
        change(model)
    onnx.save(model, path)
    return path
