"""DiffMoE: training Mixture-of-Experts diffusion transformers (arXiv 2503.14487)."""

__version__ = "0.1.0"
