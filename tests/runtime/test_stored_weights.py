import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import InputType, TensorType
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorSpec
from hif4c.runtime.stored_weights import StoredWeights


def write(directory, values):
    specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in values.items()]
    with StreamingWriter(directory, specs) as writer:
        for name, value in values.items():
            writer.write(name, value)
    return [directory / "weights.safetensors"]


def kind(name, dtype, *shape):
    return InputType(name, TensorType(dtype, shape))


VALUES = {"a": torch.arange(12.0).view(3, 4), "b": torch.linspace(-2, 2, 5).bfloat16()}


def test_tensors_are_those_of_the_file_in_the_programs_dtype(tmp_path):
    paths = write(tmp_path, VALUES)
    found = StoredWeights(paths, [kind("a", "float32", 3, 4), kind("b", "float32", 5)], tmp_path)
    assert list(found) == ["a", "b"]
    for _ in range(2):
        assert torch.equal(found["a"], VALUES["a"])
        assert torch.equal(found["b"], VALUES["b"].float())
        assert found["b"].dtype == torch.float32
        found.release()
        found.release(["a"])
    assert copy.deepcopy(found) is found


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ([kind("a", "float32", 3, 4)], "program and weights disagree about b"),
        ([kind("a", "float32", 3, 4), kind("b", "bfloat16", 5), kind("c", "int8", 1)], "disagree about c"),
        ([kind("a", "bfloat16", 3, 4), kind("b", "bfloat16", 5)], "a is torch.float32"),
        ([kind("a", "float32", 4, 3), kind("b", "bfloat16", 5)], r"the program reads float32\[4, 3\]"),
    ],
)
def test_what_does_not_fit_the_program(tmp_path, wanted, words):
    with pytest.raises(Hif4Error, match=words):
        StoredWeights(write(tmp_path, VALUES), wanted, tmp_path)


MEMORY = """
import sys
from pathlib import Path
import torch
from hif4c.runtime.executor import Executor, ReleaseAfterUse
from hif4c.runtime.graph import Graph, InputType, Node, Ref, TensorType
from hif4c.runtime.stored_weights import StoredWeights

def resident():
    return sum(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssFile"))

count, x = int(sys.argv[2]), TensorType("bfloat16", (1, 2048))
tensors = [InputType(f"blocks.{number}.weight", TensorType("bfloat16", (2048, 2048))) for number in range(count)]
nodes = [
    Node("aten.linear.default", (Ref(0 if number == 0 else count + number), Ref(1 + number)), {}, "", x)
    for number in range(count)
]
graph = Graph([InputType("x", x)], tensors, nodes, [Ref(2 * count)])
one, cpu = torch.ones(1, 2048).bfloat16(), torch.device("cpu")
torch.nn.functional.linear(one, torch.ones(2048, 2048).bfloat16())  # pages of libraries
weights = StoredWeights([Path(sys.argv[1])], tensors, Path())
for release in (True, False):
    start, seen = resident(), []
    executor = Executor(graph, weights, cpu, ReleaseAfterUse(graph, weights) if release else None)
    loaded = resident() - start
    (result,) = executor.visit([one], lambda number, arguments, value: seen.append(resident() - start))
    print(round(loaded, 1), round(max(seen), 1), round(resident() - start, 1), result.sum().item())
weights.release()
print(round(resident() - start, 1))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_memory_grows_as_weights_are_touched_and_not_at_all_when_they_are_released(tmp_path):
    """12 weights of 8 MB, 100 MB in all; a program of 12 linears."""
    count, size = 12, 8
    generator = torch.Generator().manual_seed(0)
    values = {
        f"blocks.{number}.weight": torch.randn(2048, 2048, generator=generator).bfloat16() / 45
        for number in range(count)
    }
    (path,) = write(tmp_path, values)
    command = [sys.executable, "-c", MEMORY, str(path), str(count)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    released, kept = ([float(item) for item in line.split()] for line in lines[:2])
    # Besides the weights a few MB of libraries are touched for the first time.
    assert max(released[0], kept[0]) < size / 2
    assert size * 0.9 < released[1] < 2 * size
    assert released[2] < size
    assert count * size * 0.9 < kept[1] <= kept[2] + 0.1
    assert released[3] == kept[3]
    assert float(lines[2]) < size
