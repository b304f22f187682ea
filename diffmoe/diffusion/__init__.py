"""Training objectives, samplers and guidance. Nothing here knows the network."""

from diffmoe.config import DiffusionConfig
from diffmoe.diffusion.ddpm import GaussianDiffusion
from diffmoe.diffusion.flow import FlowMatching

Objective = FlowMatching | GaussianDiffusion


def create_objective(config: DiffusionConfig) -> Objective:
    if config.objective == "ddpm":
        return GaussianDiffusion()
    return FlowMatching(config.timesteps, config.timestep_shift)
