"""Every parameter has one role; matrices that are no embedding and no router decay."""

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from diffmoe.config import RateMultipliers
from diffmoe.models.dit import DiT
from diffmoe.models.families import FAMILIES
from diffmoe.models.frozen import freeze
from diffmoe.models.matrices import hidden_matrices
from diffmoe.models.roles import roles
from diffmoe.models.updates import logged_rates
from tests.helpers.tiny import BYTES, FROZEN, tiny_config

TIMED = {"moe__router_input": "plain_with_time", "moe__shared_expert_ratio": 1.0}
ALIGNED = {"align": {"block": 2, "width": 6, "hidden": 10}}
CASES = {
    **{family: {"moe__type": family} for family in (*FAMILIES, "dense")},
    "swiglu": {"moe__activation": "swiglu", "model__mlp_activation": "swiglu"},
    "shared": {**TIMED, "moe__shared_expert_activation": "swiglu"},
    "wide head": {"model__wide_head": {"width": 20, "heads": 2}},
    "norms": {"model__qk_norm": True, "model__text": {**FROZEN}},
    "bytes": {"model__text": BYTES, "model__qk_norm": True},
    "target": {"moe__type": "race", "moe__target_loss_weight": 0.1},
    "mlp projector": ALIGNED,
    "factors": {"lora": {"rank": 2, "targets": ["attention", "mlp", "experts"]}},
    "conv projector": {"align": {**ALIGNED["align"], "projector": "conv"}},
}
# By patterns of names: all there are, and of these what decays.
ROLES = {
    "embedding": [
        *("patch_embed.*", "timestep_embed.*", "label_embed.*"),
        "wide_head.patch_embed.*",
    ],
    "text": ["text_embed.*"],
    "attention": [
        *("blocks.?.attention.*", "blocks.?.cross_attention.*"),
        "wide_head.blocks.?.attention.*",
    ],
    "mlp": [
        "wide_head.blocks.?.feed_forward.*",
        "blocks.?.feed_forward.fc[12].*",
        "blocks.?.feed_forward.gate.*",
        "blocks.?.feed_forward.up.*",
        "blocks.?.feed_forward.down.*",
        "blocks.?.feed_forward.shared_expert.*",
        "blocks.?.feed_forward.unconditional_expert.*",
    ],
    "experts": ["blocks.?.feed_forward.experts.*"],
    "router": [
        "blocks.?.feed_forward.router",
        "blocks.?.feed_forward.router_time",
        "blocks.?.feed_forward.router_hidden.*",
    ],
    "predictor": ["blocks.?.feed_forward.capacity_predictor.*"],
    "modulation": [
        *("blocks.?.adaln.*", "final_adaln.*"),
        *("wide_head.blocks.?.adaln.*", "wide_head.project.*"),
    ],
    "final": ["final.*", "blocks.?.feed_forward.target_head.*"],
    "projector": ["projector.*"],
}
NEVER = [
    *(ROLES["embedding"] + ROLES["router"]),
    "*.bias",
    "*.experts.b_*",  # two dimensions, as a matrix has
    "*.[qk]_norm.weight",
    "text_embed.null_*",
    "text_embed.encoder.embed.weight",
    "text_embed.encoder.places",
]


def network_of(changes: dict) -> DiT:
    config = tiny_config(**changes)
    with torch.device("meta"):
        return DiT(config.model, config.moe, align=config.align, lora=config.lora)


@pytest.mark.parametrize("case", CASES)
def test_each_parameter_has_one_role_and_matrices_decay(case: str):
    network = network_of(CASES[case])
    found = roles(network)
    assert list(found) == [name for name, _ in network.named_parameters()]
    for name, role in found.items():
        matching = [one for one, names in ROLES.items() if matches(name, names)]
        assert [role.name] == matching, name
        assert role.decays == (not matches(name, NEVER)), name
    assert all(found[name].decays for name in hidden_matrices(network))


def test_the_cases_have_every_role_and_everything_that_never_decays():
    names = {name for changes in CASES.values() for name in roles(network_of(changes))}
    patterns = [*NEVER, *(one for patterns in ROLES.values() for one in patterns)]
    for pattern in patterns:
        assert any(fnmatchcase(name, pattern) for name in names), pattern
    assert set(ROLES) == set(RateMultipliers.model_fields)


def test_a_parameter_without_a_role_is_an_error():
    network = network_of({})
    network.blocks[1].scale = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match=r"Block: its parameter blocks\.1\.scale has no role"):
        roles(network)


def test_rates_are_logged_of_roles_with_a_multiplier_that_train():
    config = tiny_config(
        moe__activation="swiglu",  # whose experts Muon has whole
        training__freeze=("*.router",),
        optimizer__type="muon",
        optimizer__learning_rate=0.5,
        optimizer__muon__learning_rate=0.25,
        optimizer__rate_multipliers={"experts": 2.0, "attention": 3.0, "router": 0.5},
    )
    with torch.device("meta"):
        network = DiT(config.model, config.moe)
    freeze(network, config.training)
    assert logged_rates(network, config.optimizer) == {
        "learning_rate": 0.5,
        "muon_learning_rate": 0.25,
        "experts_muon_learning_rate": 0.5,
        "attention_muon_learning_rate": 0.75,
        "attention_learning_rate": 1.5,  # of its biases
    }


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
