"""Models of transformers, from local folders alone: whole, in fp32, frozen, known by checksum."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffmoe.errors import UserError
from diffmoe.files import read_text

_KINDS = {"t5": "t5", "clip": "clip", "clip_text_model": "clip"}


def model_kind(folder: str | Path) -> str:
    """ "t5" or "clip", as config.json says. Raises UserError for anything else."""
    file = Path(folder) / "config.json"
    try:
        found = json.loads(read_text(file)).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder} is no local folder of a text encoder: {file} cannot be read ({error}); "
            "nothing is downloaded, put it there"
        ) from None
    if found not in _KINDS:
        raise UserError(f"{file} says model_type={found}; give a folder of a T5 or a CLIP")
    return _KINDS[found]


def load_model(folder: str | Path, name: str, device: str | torch.device) -> nn.Module:
    """The model of a folder, as transformers' class of this name. Raises UserError."""
    network, told = _load(folder, name, dtype=torch.float32, output_loading_info=True)
    if told["missing_keys"]:
        raise UserError(
            f"{folder} has no weights for {min(told['missing_keys'])} of {name}; give a whole "
            "folder"
        )
    return network.to(device).eval().requires_grad_(False)


def load_preparation(folder: str | Path, name: str) -> Any:
    """The tokenizer, or what prepares images, of a folder. Raises UserError."""
    return _load(folder, name)


def _load(folder: str | Path, name: str, **options: Any) -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            f'{folder} needs transformers, which is not installed; run: pip install "diffmoe[text]"'
        ) from None
    # It would list the weights that are left out, and would not fail for those that are missing.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True, **options)
    # ImportError: some tokenizers need a package of their own.
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{folder} cannot be loaded as {name} ({error}); give a whole folder: config.json, "
            "weights, tokenizer"
        ) from error


def checksum_of(model: nn.Module, tokenizer: Any) -> str:
    """Of the weights and the vocabulary, whatever files and versions they came in."""
    # Names of parameters change between versions of transformers, their numbers do not.
    weights = sorted(_digest(parameter) for parameter in model.parameters())
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256("\n".join([*weights, vocabulary]).encode()).hexdigest()[:16]


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy()).hexdigest()
