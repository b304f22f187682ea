"""Code that the user names on the command line: TorchScript files and functions."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from diffmoe.errors import UserError

SCRIPTS = (".pt", ".ts")  # endings of TorchScript files


def open_torchscript(file: Path, device: torch.device) -> torch.jit.ScriptModule:
    """Load a file of torch.jit.save, for evaluation. Raises UserError if that fails."""
    if not file.is_file():
        raise UserError(f"{file} is missing; nothing is downloaded: put the file there")
    try:
        return torch.jit.load(file, map_location=device).eval()
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{file} is not a TorchScript file ({first})") from None


def import_function(specification: str) -> Callable:
    """Import `package.module:function`, installed or in the current folder.

    This runs its code: specifications come only from the command line, never from a file.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    module, _, name = specification.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{specification} cannot be imported: {error}") from None
