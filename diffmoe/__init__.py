"""DiffMoE: training Mixture-of-Experts diffusion transformers (arXiv 2503.14487).

diffmoe.load_config(recipe, overrides) gives a run's settings and diffmoe.train(config) trains;
diffmoe.load(path) gives a model, diffmoe.Pipeline(path) one that makes images. What a user can mend
is raised as diffmoe.UserError.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffmoe.errors import UserError
    from diffmoe.export.open import load
    from diffmoe.pipeline import Pipeline
    from diffmoe.recipes import load_config
    from diffmoe.training.start import start as train

__version__ = "0.1.0"
__all__ = ["Pipeline", "UserError", "load", "load_config", "train"]

# Public name -> module and name there.
_PLACES = {
    "Pipeline": ("diffmoe.pipeline", "Pipeline"),
    "UserError": ("diffmoe.errors", "UserError"),
    "load": ("diffmoe.export.open", "load"),
    "load_config": ("diffmoe.recipes", "load_config"),
    "train": ("diffmoe.training.start", "start"),
}


def __getattr__(name: str) -> Any:
    """Imported when asked for, so that `import diffmoe` costs nothing."""
    if name not in _PLACES:
        raise AttributeError(f"module 'diffmoe' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
