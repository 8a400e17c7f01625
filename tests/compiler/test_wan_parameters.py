import dataclasses

import pytest
from torch import nn

from hif4c.compiler.capture import build_transformer
from hif4c.compiler.locate import describe_model
from hif4c.compiler.models import WanConfig
from hif4c.compiler.wan_parameters import is_linear_weight, parameter_shapes
from tests.support.checkpoints import VARIANTS, small_config


def assert_describes_the_model(config):
    model = build_transformer(config)
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert parameter_shapes(config) == parameters
    linears = [f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [name for name in parameter_shapes(config) if is_linear_weight(name)] == linears


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_models(variant):
    assert_describes_the_model(WanConfig.from_dict(small_config(variant), "config.json"))


def test_without_norms_before_the_text_and_with_another_patch():
    config = small_config("t2v", cross_attn_norm=False, patch_size=[1, 4, 2], num_layers=1, out_channels=5)
    assert_describes_the_model(WanConfig.from_dict(config, "config.json"))


@pytest.mark.parametrize("name", ["Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B", "Wan2.2-TI2V-5B"])
def test_published_models(name):
    """Of full width; blocks are all alike, so two stand for them."""
    for config in set(describe_model(name).configs.values()):
        assert_describes_the_model(dataclasses.replace(config, num_layers=2))
