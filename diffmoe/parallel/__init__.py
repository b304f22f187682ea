"""Ranks, groups, and what travels between them."""

import os

import torch

# DeepSpeed reads it while it is imported; without it a machine without a GPU gets a warning.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
