"""Initial weights as numbers: a refactoring that changes any of them shows here."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from diffmoe.config import Config
from diffmoe.conversion.release import config_from_release
from diffmoe.models.dit import DiT
from diffmoe.models.initialization import initializers_of
from tests.helpers.tiny import BYTES, FROZEN, WITHOUT_POOLED, tiny_config

GOLDEN = Path(__file__).with_name("initial_weights.json")
RELEASE = {
    "input_size": 8,
    "in_channels": 2,
    "patch_size": 2,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "head_dim": 4,
    "mlp_ratio": 4,
    "num_classes": 5,
    "learn_sigma": True,
    "class_dropout_prob": 0.1,
    "use_swiglu": True,
    "MoE_config": {
        "num_experts": 4,
        "capacity": 2,
        "n_shared_experts": 1,
        "interleave": True,
        "init_MoeMLP": True,
    },
}
SWIGLU = {"activation": "swiglu", "shared_expert_activation": "swiglu", "shared_expert_ratio": 2.0}
CONFIGS = {
    "diffmoe": tiny_config(),
    "dense": tiny_config(moe__type="dense", model__qk_norm=True, model__rope=True),
    "token choice": tiny_config(moe__type="token_choice"),
    "expert choice": tiny_config(moe__type="expert_choice", moe__every_block=True),
    "swiglu and shared": tiny_config(
        model__mlp_activation="swiglu", **{f"moe__{key}": value for key, value in SWIGLU.items()}
    ),
    "release options": config_from_release("DiffMoE", RELEASE),
    "bytes": tiny_config(model__text=BYTES, model__qk_norm=True),
    "features": tiny_config(model__text=FROZEN),
    "features without pooled": tiny_config(model__text=WITHOUT_POOLED),
}


def fingerprint(config: Config) -> dict[str, float]:
    """One number for each tensor, which depends on all of its elements and their order."""
    network = DiT(config.model, config.moe).initialize(3)
    found = {}
    for name, tensor in network.state_dict().items():
        flat = tensor.double().flatten()
        found[name] = float(flat @ torch.linspace(1, 2, len(flat), dtype=torch.float64))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_initial_weights_are_those_of_before(name: str):
    expected = json.loads(GOLDEN.read_text())[name]
    # Processors differ in the last bit of normally distributed numbers.
    assert fingerprint(CONFIGS[name]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_new_network_is_initialized_unless_it_is_to_be_filled():
    config = CONFIGS["dense"]
    network = DiT(config.model, config.moe)
    expected = DiT(config.model, config.moe, seed=None).initialize(0)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    assert (
        len(
            {
                float(DiT(config.model, config.moe, seed=s).patch_embed.weight.detach().sum())
                for s in (0, 1)
            }
        )
        == 2
    )
    with torch.device("meta"):
        assert DiT(config.model, config.moe).final.weight.is_meta


def test_one_parameter_alone_starts_as_in_the_network():
    config = CONFIGS["bytes"]
    network = DiT(config.model, config.moe).initialize(3)
    with torch.device("meta"):
        empty = DiT(config.model, config.moe, seed=None)
    for name, parameter in network.named_parameters():
        if name not in network.expert_parameters():
            assert torch.equal(empty.initial_value(name, 3), parameter), name


def test_a_parameter_without_an_initializer_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

    with pytest.raises(TypeError, match="Scale does not say how its parameter factor starts"):
        initializers_of(nn.Sequential(nn.Linear(2, 2), Scale()))
