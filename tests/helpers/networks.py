"""Networks without training, whose experts are neither idle nor always at work."""

from diffmoe.config import Config
from diffmoe.models.dit import DiT
from diffmoe.parallel.topology import Topology
from tests.helpers.tiny import randomize, tiny_config

CONFIG = tiny_config()
DDPM = tiny_config(diffusion__objective="ddpm", model__learn_sigma=True)


def network_of(config: Config, topology: Topology | None = None) -> DiT:
    """In evaluation, with thresholds that about half of all token-expert pairs pass."""
    network = randomize(DiT(config.model, config.moe, topology))
    for layer in network.moe_layers:
        if layer.capacity_predictor is not None:
            layer.capacity_predictor.thresholds.fill_(0.5)
    return network.eval()
