"""Reads state dicts from files of torch.save, without running any code in them."""

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.files import check_unpacked, does_not_exist, refuse_special

# The files of DiT, SiT and the release also hold the options of their training.
_HARMLESS: list[Any] = [argparse.Namespace]
_COMPILED, _HEADS = "_orig_mod", "projectors."
_ENTRIES = {"ema": ("ema",), "live": ("model", "state_dict")}


class StateDict(NamedTuple):
    """Tensors by name.

    weights: ema or live; a plain state dict is taken for ema, as published ones are. entry: of the
    file, None if it is a plain state dict. num_classes: from the options of its training, or None.
    notes: what was removed from the names, and which tensors were left out.
    """

    tensors: dict[str, Tensor]
    weights: str
    entry: str | None
    num_classes: int | None = None
    notes: tuple[str, ...] = ()


def load_file(path: Path) -> Any:
    """Unpickle with torch.load(weights_only=True); tensors are memory-mapped.

    Raises UserError with the reason if the file is refused or cannot be read.
    """
    try:
        refuse_special(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_unpacked(archive, path.stat().st_size)
                damaged = archive.testzip()  # torch does not verify the checksums
            if damaged is not None:
                raise UserError(f"{path} is damaged: {damaged} does not match its checksum")
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(does_not_exist(path)) from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is not a file of torch.save, or its pickle holds more than "
            f"tensors and plain values, which may be code ({_reason(error)}). If you trust it, "
            "save its state dict alone"
        ) from None
    # A damaged file can cause any error: of the zip reader, the unpickler, sizes, encodings.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a file of torch.save ({type(error).__name__}: "
            f"{_reason(error)}); is it complete?"
        ) from None


def load_state(path: Path, weights: str = "ema") -> StateDict:
    """The state dict of a file: its entry for the requested weights, or the file itself.

    weights: ema: entry `ema`; live: entry `model` or `state_dict`. Removes what wrappers add to
    names (`module.` of DDP, `_orig_mod.` of torch.compile), and heads that only training uses
    (`projectors.`). Raises UserError if there is no such state dict.
    """
    if weights not in _ENTRIES:
        raise UserError(f"--weights {weights}: choose ema or live for {path}")
    content = load_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    entries = [
        key for keys in _ENTRIES.values() for key in keys if isinstance(content.get(key), dict)
    ]
    entry = next((key for key in _ENTRIES[weights] if key in entries), None)
    if entries and entry is None:
        raise UserError(
            f"{path} has no {weights} weights, only the entries {', '.join(entries)}: choose "
            f"--weights {'live' if weights == 'ema' else 'ema'}"
        )
    state = content if entry is None else content[entry]
    for name, value in state.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            raise UserError(
                f"{path}: {name!r} is a {type(value).__name__}, not a tensor; the entries are "
                f"{', '.join(str(key) for key in list(content)[:8])}"
            )
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            raise UserError(f"{path}: {name} is a {value.dtype} tensor, which weights cannot be")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} has the shape {tuple(value.shape)}, but fewer numbers")
    if not state:
        raise UserError(f"{path} holds no tensors")
    state, notes = _clean(state, path)
    if not state:
        raise UserError(f"{path} holds no tensors of a network; {'; '.join(notes)}")
    return StateDict(state, weights if entry else "ema", entry, _num_classes(content), notes)


def _clean(state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors by their names in the network, without heads of training; notes on changes."""
    notes = []
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        short = ".".join(part for part in name.split(".") if part != _COMPILED)
        if short in plain:
            raise UserError(f"{path}: {name} exists with and without {_COMPILED}")
        plain[short] = value
    if plain.keys() != state.keys():
        notes.append(f"removed {_COMPILED} (torch.compile) from names")
    if all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): value for name, value in plain.items()}
        notes.append("removed module. (DDP) from names")
    heads = [name for name in plain if name.startswith(_HEADS)]
    if heads:
        notes.append(
            f"left out {len(heads)} tensors {_HEADS}*: heads that align the network with another "
            "one in training"
        )
    return {name: value for name, value in plain.items() if name not in heads}, tuple(notes)


def _num_classes(content: dict[str, Any]) -> int | None:
    """From the arguments of the training command, which DiT and SiT store with the weights."""
    options = content.get("args")
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    found = options.get("num_classes") if isinstance(options, dict) else None
    return found if type(found) is int and found > 0 else None


def _reason(error: Exception) -> str:
    """The line of torch's long explanation that names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (named or lines or ["no reason given"])[0][:200]
