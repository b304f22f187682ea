"""Training objectives, samplers and guidance. Nothing here knows the network."""

from typing import TYPE_CHECKING, TypeAlias

from diffmoe.config import DiffusionConfig

if TYPE_CHECKING:
    from diffmoe.diffusion.ddpm import GaussianDiffusion
    from diffmoe.diffusion.flow import FlowMatching

Objective: TypeAlias = "FlowMatching | GaussianDiffusion"


def create_objective(config: DiffusionConfig) -> Objective:
    # Imported here: the command line reads diffusion.settings, and its --help imports no torch.
    from diffmoe.diffusion.ddpm import GaussianDiffusion
    from diffmoe.diffusion.flow import FlowMatching

    if config.objective == "ddpm":
        return GaussianDiffusion()
    return FlowMatching(config.timesteps, config.timestep_shift)
