"""DiffMoE: training Mixture-of-Experts diffusion transformers (arXiv 2503.14487).

diffmoe.load(path) gives a model, diffmoe.Pipeline(path) one that makes images.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffmoe.export.open import load
    from diffmoe.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "load"]


def __getattr__(name: str) -> Any:
    """Imported when asked for, so that `import diffmoe` costs nothing."""
    if name == "load":
        from diffmoe.export.open import load

        return load
    if name == "Pipeline":
        from diffmoe.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'diffmoe' has no attribute {name!r}")
