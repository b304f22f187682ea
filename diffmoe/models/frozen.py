"""Which parameters a run leaves as they are: by training.freeze, training.train_only and LoRA."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Protocol

import torch

from diffmoe.config import Config, TrainingConfig
from diffmoe.errors import UserError
from diffmoe.models.alignment import is_of_projector
from diffmoe.models.dit import DiT
from diffmoe.models.lora import is_factor


class Trained(Protocol):
    """The settings of a run, or of a checkpoint."""

    @property
    def freeze(self) -> tuple[str, ...]: ...

    @property
    def train_only(self) -> tuple[str, ...]: ...


def check(config: Config) -> None:
    """Raise UserError for a pattern that matches nothing, and if nothing is left to train."""
    if config.training.freeze or config.training.train_only or config.lora.rank:
        with torch.device("meta"):
            network = DiT(config.model, config.moe, align=config.align, lora=config.lora)
        frozen_names(network, config.training)


def freeze(network: DiT, training: TrainingConfig) -> None:
    """No gradients for what is frozen. Raises UserError as `frozen_names`."""
    frozen = frozen_names(network, training)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)


def frozen_names(network: DiT, training: Trained) -> frozenset[str]:
    """Of the parameters that do not train.

    With LoRA they are all of its base that train_only does not name; a projector trains. Patterns
    are those of the shell, of whole names. Raises UserError for one that matches no parameter, and
    if all are frozen.
    """
    names = [name for name, _ in network.named_parameters()]
    frozen = _matching("training.freeze", training.freeze, names)
    train_only = _matching("training.train_only", training.train_only, names)
    if any(map(is_factor, names)):
        base = {name for name in names if not is_factor(name) and not is_of_projector(name)}
        frozen |= base - train_only
    elif train_only:
        frozen = frozenset(names) - train_only
    if len(frozen) == len(names):
        raise UserError(
            f"training.freeze={list(training.freeze)} leaves no parameter to train; take fewer"
        )
    return frozen


def _matching(setting: str, patterns: Iterable[str], names: list[str]) -> frozenset[str]:
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            near = difflib.get_close_matches(pattern, names, 1, cutoff=0.0)[0]
            raise UserError(
                f"{setting}: {pattern} matches no parameter of the network; names are such as "
                f"{near}, and tools/plan.py --parameters lists all"
            )
        found |= matching
    return frozenset(found)
