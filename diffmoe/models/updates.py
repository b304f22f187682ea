"""How a run's optimizer updates each parameter: optimizer.* by role."""

import torch

from diffmoe.config import Config, OptimizerConfig
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.matrices import hidden_matrices
from diffmoe.models.roles import roles
from diffmoe.parallel.update import Update


def updates(network: DiT, optimizer: OptimizerConfig) -> dict[str, Update]:
    """By name, of every parameter, frozen or not."""
    muon = optimizer.muon
    matrices = hidden_matrices(network) if optimizer.type == "muon" else {}
    found = {}
    for name, role in roles(network).items():
        stack = matrices.get(name)
        rate, decay = optimizer.learning_rate, optimizer.weight_decay if role.decays else 0.0
        if stack is not None:
            rate, decay = muon.learning_rate or rate, muon.weight_decay
        multiplier = getattr(optimizer.rate_multipliers, role.name)
        found[name] = Update(rate * multiplier, decay, stack)
    return found


def logged_rates(network: DiT, optimizer: OptimizerConfig) -> dict[str, float]:
    """Rates after the warm-up by the name of their metric.

    learning_rate is AdamW's and muon_learning_rate Muon's, both without multiplier; of a role with
    one, of which anything trains, also e.g. router_learning_rate.
    """
    found = {"learning_rate": optimizer.learning_rate}
    if optimizer.type == "muon":
        found["muon_learning_rate"] = optimizer.muon.learning_rate or optimizer.learning_rate
    by_role = roles(network)
    for name, update in updates(network, optimizer).items():
        role = by_role[name].name
        trains = network.get_parameter(name).requires_grad
        if trains and getattr(optimizer.rate_multipliers, role) != 1:
            kind = "learning_rate" if update.matrices is None else "muon_learning_rate"
            found[f"{role}_{kind}"] = update.rate
    return found


def check(config: Config) -> None:
    """Raise UserError for a multiplier of a role that the network does not have."""
    multiplied = {role: m for role, m in config.optimizer.rate_multipliers if m != 1}
    if not multiplied:
        return
    with torch.device("meta"):
        network = DiT(config.model, config.moe, align=config.align, lora=config.lora)
    there = dict.fromkeys(role.name for role in roles(network).values())
    for role, multiplier in multiplied.items():
        if role not in there:
            raise UserError(
                f"optimizer.rate_multipliers.{role}={multiplier}: the network has no such "
                f"parameters; its roles are {', '.join(there)}"
            )
