"""Training objectives, samplers and guidance. Nothing here knows the network.

flow.py and ddpm.py: what is trained. samplers.py: from noise to data. guidance.py: classifier-free
guidance. settings.py: the settings of sampling.
"""

from diffmoe.config import DiffusionConfig
from diffmoe.diffusion.ddpm import GaussianDiffusion
from diffmoe.diffusion.flow import FlowMatching

Objective = FlowMatching | GaussianDiffusion


def create_objective(config: DiffusionConfig) -> Objective:
    """The objective that a configuration names."""
    if config.objective == "ddpm":
        return GaussianDiffusion()
    return FlowMatching(config.timesteps, config.timestep_shift)
