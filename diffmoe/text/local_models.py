"""T5 and CLIP of transformers from local folders: complete, in fp32, frozen, with a checksum."""

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
            f"{folder} is not a local folder of a text encoder: {file} cannot be read ({error}); "
            "nothing is downloaded, copy the encoder there"
        ) from None
    if found not in _KINDS:
        raise UserError(f"{file} says model_type={found}; give the folder of a T5 or CLIP")
    return _KINDS[found]


def load_model(folder: str | Path, name: str, device: str | torch.device) -> Any:
    """A folder's model as the transformers class `name`, in fp32 and frozen. Raises UserError."""
    network, loading = _load(folder, name, dtype=torch.float32, output_loading_info=True)
    if loading["missing_keys"]:
        raise UserError(
            f"{folder} has no weights for {min(loading['missing_keys'])} of {name}; give a "
            "complete folder"
        )
    return network.to(device).eval().requires_grad_(False)


def load_processor(folder: str | Path, name: str) -> Any:
    """A folder's tokenizer or image processor, of the class `name`. Raises UserError."""
    return _load(folder, name)


def _load(folder: str | Path, name: str, **options: Any) -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            f'{folder} needs transformers, which is not installed; run: pip install "diffmoe[text]"'
        ) from None
    # Silent: it would list unused weights. Missing ones are checked in load_model.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True, **options)
    # ImportError: some tokenizers need a package of their own.
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{folder} cannot be loaded as {name} ({error}); give a complete folder: config.json, "
            "weights, tokenizer"
        ) from error


def checksum_of(model: nn.Module, tokenizer: Any = None) -> str:
    """Of the weights, and the vocabulary if there is one, independent of file formats and library
    versions.
    """
    # Parameter names change between versions of transformers, their values do not.
    weights = sorted(_digest(parameter) for parameter in model.parameters())
    if tokenizer is not None:
        weights.append(json.dumps(sorted(tokenizer.get_vocab().items())))
    return hashlib.sha256("\n".join(weights).encode()).hexdigest()[:16]


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().data).hexdigest()
