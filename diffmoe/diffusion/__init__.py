"""Training objectives, samplers and guidance. Nothing here knows the network.

flow.py and ddpm.py: what is trained. samplers.py: from noise to data. guidance.py: classifier-free
guidance. settings.py: the settings of sampling.
"""

from typing import TYPE_CHECKING, TypeAlias

from diffmoe.config import Config

if TYPE_CHECKING:
    from diffmoe.diffusion.ddpm import GaussianDiffusion
    from diffmoe.diffusion.flow import FlowMatching

Objective: TypeAlias = "FlowMatching | GaussianDiffusion"


def create_objective(config: Config) -> Objective:
    """The objective that a configuration names."""
    # Imported here: the command line reads diffusion.settings, and its --help imports no torch.
    from diffmoe.diffusion.ddpm import GaussianDiffusion
    from diffmoe.diffusion.flow import FlowMatching

    if config.diffusion.objective == "ddpm":
        return GaussianDiffusion()
    return FlowMatching(config.diffusion.timesteps, config.timestep_shift)
