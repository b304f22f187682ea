"""What to do with a data folder once it is packed."""

import shlex
from pathlib import Path

from diffmoe.data.manifest import Manifest
from diffmoe.recipes import load_config


def training_command(manifest: Manifest, directory: str | Path) -> str:
    """A command that trains on data with classes: a recipe, and all that it must be told.

    The small recipe for pixels, an ImageNet recipe for an autoencoder's latents.
    """
    recipe = "mnist" if manifest.autoencoder == "identity" else "diffmoe_s_e16_flow"
    config = load_config(recipe)
    wanted = {
        "data.path": str(directory),
        **manifest.run_settings(config),
        "output": f"runs/{Path(directory).resolve().name}",
    }
    settings = " ".join(f"{key}={shlex.quote(str(value))}" for key, value in wanted.items())
    return f"python train.py --config {recipe} {settings}"
