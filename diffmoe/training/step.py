"""What every optimizer step is made of: the network in its engine, and a micro-batch's losses."""

from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from diffmoe.config import Config
from diffmoe.data.examples import Examples
from diffmoe.diffusion import Objective
from diffmoe.models.dit import DiT
from diffmoe.models.moe import LayerRouting, routing_loss
from diffmoe.parallel.topology import Topology
from diffmoe.parallel.zero import create_engine, engine_settings


def build(
    config: Config, ds_settings: dict[str, Any], topology: Topology, device: torch.device
) -> tuple[DiT, DeepSpeedEngine]:
    """The network at its initialization, ready to train, and the engine that steps it."""
    network = DiT(config.model, config.moe, topology).initialize(config.seed).to(device)
    network.checkpoint_activations(config.training.activation_checkpointing)
    network.train()
    if config.training.compile:
        for block in network.blocks:
            block.compile()
    engine = create_engine(
        network,
        experts=network.expert_parameters(),
        num_experts=config.moe.experts,
        optimizer=torch.optim.AdamW,
        optimizer_options={
            "lr": config.optimizer.learning_rate,
            "betas": config.optimizer.betas,
            "eps": config.optimizer.eps,
            "weight_decay": config.optimizer.weight_decay,
            "fused": True,
        },
        settings=engine_settings(config, ds_settings, topology.world),
        topology=topology,
    )
    return network, engine


def losses_of(
    engine: DeepSpeedEngine, objective: Objective, examples: Examples, config: Config
) -> tuple[Tensor, dict[str, Tensor], list[LayerRouting]]:
    """Forward of one micro-batch: its loss, what that is made of, and what was routed where."""
    output = engine(examples.x_t, examples.t, examples.condition)
    parts = objective.loss(
        output.prediction, examples.x_t, examples.data, examples.noise, examples.t
    )
    parts = {name: part.mean() for name, part in parts.items()}
    auxiliary = routing_loss(output.routing, config.moe)
    loss = parts["loss"] + auxiliary
    parts["routing_loss"] = torch.as_tensor(auxiliary, device=loss.device)
    return loss, parts, output.routing
