"""Families of routing, by moe.type: which expert takes which token. One file each.

A family is a subclass of MoEFeedForward that defines `_select`; what it needs beyond that (a loss,
a state, thresholds) it says in the same file.
"""

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.models.families.diffmoe import DiffMoE
from diffmoe.models.families.dsmoe import DSMoE
from diffmoe.models.families.expert_choice import ExpertChoice
from diffmoe.models.families.promoe import ProMoE
from diffmoe.models.families.race import ExpertRace
from diffmoe.models.families.token_choice import TokenChoice
from diffmoe.models.moe import MoEFeedForward
from diffmoe.parallel.topology import Topology

FAMILIES: dict[str, type[MoEFeedForward]] = {
    "diffmoe": DiffMoE,
    "expert_choice": ExpertChoice,
    "token_choice": TokenChoice,
    "race": ExpertRace,
    "promoe": ProMoE,
    "dsmoe": DSMoE,
}


def create_moe(model: ModelConfig, moe: MoEConfig, topology: Topology) -> MoEFeedForward:
    """The feed-forward of moe.type, which must not be dense."""
    return FAMILIES[moe.type](model, moe, topology)
