"""What to do with a data folder once it is packed."""

from pathlib import Path

from diffmoe.data.manifest import Manifest, as_words
from diffmoe.recipes import load_config

# Recipes for pixels and for an autoencoder's latents.
_OF_CLASSES = ("mnist", "diffmoe_s_e16_flow")
_OF_CAPTIONS = ("captioned_digits", "t2i_s_e8")


def training_command(manifest: Manifest, directory: str | Path) -> str:
    """A command that trains on the data: a recipe, and all that it must be told."""
    recipes = _OF_CLASSES if manifest.text is None else _OF_CAPTIONS
    recipe = recipes[manifest.autoencoder != "identity"]
    config = load_config(recipe)
    wanted = {
        "data.path": str(directory),
        **manifest.settings_to_change(config.model, config.data.lanes),
        "output": f"runs/{Path(directory).resolve().name}",
    }
    return f"python train.py --config {recipe} {as_words(wanted)}"
