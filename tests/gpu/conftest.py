"""What tests on a GPU share. They hold what only a GPU can tell; `pytest tests/gpu` on such a machine settles it."""

from pathlib import Path

import pytest
import torch

from hif4c.compiler.gpu_kernels import build_gpu_kernels
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.gpu.driver import Driver, fitting_targets, open_driver
from tests.support.gpu_artifacts import open_and_trust


@pytest.fixture(scope="session", autouse=True)
def gpu_present() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here; run `pytest tests/gpu` on a machine with one")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def driver() -> Driver:
    return open_driver()


@pytest.fixture(scope="session")
def target(driver: Driver) -> str:
    """The target whose binaries suit this GPU best."""
    found = driver.device(0)
    if not (targets := fitting_targets(found.architecture)):
        pytest.skip(f"hif4c builds no kernels for {found}")
    return targets[0]


@pytest.fixture(scope="session")
def shipped(target: str, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Everything that is shipped for this GPU, and nothing else, trusted."""
    pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")
    root = tmp_path_factory.mktemp("shipped")
    build_gpu_kernels(target, root / "kernels" / target, lambda text: None)
    return open_and_trust(Path(root))
