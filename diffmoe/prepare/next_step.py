"""What to do with a data folder once it is packed."""

import math
import shlex
from pathlib import Path

from diffmoe.config import Config
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
        **manifest.model_settings(config.model),
        **_divisible(config, manifest),
        "output": f"runs/{Path(directory).resolve().name}",
    }
    settings = " ".join(f"{key}={shlex.quote(str(value))}" for key, value in wanted.items())
    return f"python train.py --config {recipe} {settings}"


def _divisible(config: Config, manifest: Manifest) -> dict[str, int]:
    """Patches that divide the image, and lanes for which there are shards, where others are set."""
    size, shards = math.gcd(*manifest.shape[1:]), len(manifest.shards)
    patch, lanes = config.model.patch_size, config.data.lanes
    fitting = {
        "model.patch_size": max(n for n in range(1, patch + 1) if size % n == 0),
        "data.lanes": max(n for n in range(1, lanes + 1) if lanes % n == 0 and n <= shards),
    }
    now = {"model.patch_size": patch, "data.lanes": lanes}
    return {key: value for key, value in fitting.items() if value != now[key]}
