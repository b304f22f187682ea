"""Models that can be written: metadata, and tensors by our names, one at a time.

Here from checkpoints and exported folders. conversion/foreign.py makes sources from other projects'
files, conversion/upcycling.py from other sources.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe.capacity.thresholds import Calibrated, stored
from diffmoe.checkpoints import checksums
from diffmoe.checkpoints.checksums import find_damage
from diffmoe.checkpoints.folder import find_complete
from diffmoe.checkpoints.inspect import StoredCheckpoint, open_checkpoint
from diffmoe.checkpoints.posthoc import combined_average
from diffmoe.config import Config, LoRAConfig
from diffmoe.errors import UserError
from diffmoe.export.autoencoder_folder import with_own_autoencoder
from diffmoe.export.exported_model import ExportedModel
from diffmoe.export.metadata import Metadata, parse_metadata
from diffmoe.export.tensors import Read, Shapes, check_state_dict, require_finite
from diffmoe.files import sha256_of
from diffmoe.latent_spec import LatentSpec
from diffmoe.models.dit import DiT
from diffmoe.models.frozen import frozen_names
from diffmoe.models.lora import factor_names, is_factor, merged


@dataclass(frozen=True)
class Source:
    """A model that can be written.

    where: its name in errors. read: gives a tensor by name, in its shape of `shapes`. thresholds:
    calibrated ones of these weights. run: the folder of the run, for its results. notes: for the
    user.
    """

    where: str
    metadata: Metadata
    shapes: Shapes
    read: Read
    thresholds: dict[str, Calibrated] = field(default_factory=dict)
    run: Path | None = None
    notes: tuple[str, ...] = ()

    def checked(self) -> "Source":
        """The same source, after a check of names and shapes; each tensor is checked for NaN when
        it is read. Raises UserError.
        """
        check_state_dict(self.shapes, self.metadata.model, self.metadata.moe, self.where)
        return replace(self, read=self._read_finite)

    def _read_finite(self, name: str) -> Tensor:
        return require_finite(name, self.read(name), self.where)


@dataclass(frozen=True)
class Unmerged(Source):
    """A LoRA run's checkpoint as it is stored: the weights of its base, and their factors.

    trained: names of what the run has changed: factors, other parameters, routing's state. base:
    name of the model that it started from.
    """

    lora: LoRAConfig = field(default_factory=LoRAConfig)
    trained: frozenset[str] = frozenset()
    base: str | None = None

    def checked(self) -> "Unmerged":
        """The same source; each tensor is checked for NaN when it is read."""
        return replace(self, read=self._read_finite)

    def merged(self) -> Source:
        """The model that the run trains, with the factors merged into their weights."""

        def read(name: str) -> Tensor:
            a, b = factor_names(name)
            weight = self.read(name)
            if a not in self.shapes:
                return weight
            return merged(weight, self.read(a), self.read(b), self.lora.scale)

        shapes = {name: shape for name, shape in self.shapes.items() if not is_factor(name)}
        made = self.metadata.provenance
        step = f"LoRA of rank {self.lora.rank} merged"
        made = made.model_copy(update={"steps": (*made.steps, step)})
        return Source(
            self.where,
            self.metadata.model_copy(update={"provenance": made}),
            shapes,
            read,
            self.thresholds,
            self.run,
            self.notes,
        )


@contextlib.contextmanager
def exported_source(path: Path) -> Iterator[Source]:
    """An exported folder, for example to write it in another type. Its checksums are verified."""
    model = ExportedModel(path)
    model.verify()
    latents = with_own_autoencoder(model.metadata.latents, path)
    metadata = model.metadata.model_copy(update={"latents": latents})
    yield Source(str(path), metadata, model.shapes, model.read, stored(path))


@contextlib.contextmanager
def checkpoint_source(path: Path, weights: str = "ema") -> Iterator[Source]:
    """A run's newest checkpoint or a given one, saved by any number of ranks, P and ZeRO stage.

    weights: ema, live, or ema:STD, a power-function average reconstructed from those of the run
    (path is then the run's folder). Factors of LoRA are merged. Checksums are verified, and the
    checkpoint is not pruned while it is read. Raises UserError if it is damaged or does not have
    these weights.
    """
    with _stored_source(path, weights) as source:
        yield source.merged() if isinstance(source, Unmerged) else source


@contextlib.contextmanager
def unmerged_source(path: Path, weights: str = "ema") -> Iterator[Unmerged]:
    """Of a LoRA run, as `checkpoint_source`, but with the factors apart. weights: ema or live."""
    if weights not in ("ema", "live"):
        raise UserError(f"--weights {weights}: adapters are of ema or live weights")
    with open_checkpoint(find_complete(path)) as checkpoint:
        if not checkpoint.config.lora.rank:
            raise UserError(
                f"{checkpoint.path} has no adapters: it was trained without LoRA (lora.rank); "
                "leave --adapters out"
            )
        if "weights" not in checkpoint.prefixes:
            raise UserError(
                f"{checkpoint.path} holds averages alone, its base may be rounded; take a "
                "step-XXXXXXXX for --adapters"
            )
    with _stored_source(path, weights) as source:
        assert isinstance(source, Unmerged)
        yield source


@contextlib.contextmanager
def _stored_source(path: Path, weights: str) -> Iterator[Source]:
    kind, _, std = weights.partition(":")
    if kind not in ("ema", "live") or (std and kind == "live"):
        raise UserError(f"--weights {weights}: choose ema, live, or ema:STD such as ema:0.10")
    if std:
        with combined_average(path, _number(std)) as average:
            yield _source(average.newest, f"ema:{average.std:g}", average.read)
        return
    with open_checkpoint(find_complete(path)) as stored_there:
        problems = find_damage(stored_there.path)
        if problems:
            raise UserError(f"{problems[0]}; take another checkpoint")
        prefix = {"ema": "ema", "live": "weights"}[kind]
        if not any(name.startswith(f"{prefix}/") for name in stored_there.shapes):
            other = "live" if kind == "ema" else "ema"
            raise UserError(f"{stored_there.path} has no {kind} weights; choose --weights {other}")

        def read(name: str) -> Tensor:
            return stored_there.read(f"{prefix}/{name}")

        yield _source(stored_there, kind, read)


def _source(checkpoint: StoredCheckpoint, weights: str, read: Callable[[str], Tensor]) -> Source:
    """read: gives parameters by name. Thresholds are the checkpoint's, never averaged."""
    path, record, config = checkpoint.path, checkpoint.record, checkpoint.config
    prefix = "weights" if weights == "live" else "ema"
    if not any(name.startswith(f"{prefix}/") for name in checkpoint.shapes):
        prefix = next(iter(checkpoint.prefixes))  # of power-function averages, with equal shapes
    shapes = {
        name.partition("/")[2]: shape
        for name, shape in checkpoint.shapes.items()
        if name.partition("/")[0] in (prefix, "buffers")
    }
    buffers = {name.partition("/")[2] for name in checkpoint.shapes if name.startswith("buffers/")}
    latents = LatentSpec.from_manifest(record.latents, path / "run.json")
    values: dict[str, Any] = {
        "weights": weights,
        "model": config.model.model_dump(),
        "moe": config.moe.model_dump(),
        "diffusion": config.diffusion.model_dump(),
        "latents": latents,
        "class_names": record.latents.get("class_names"),
        "label_dropout": config.training.label_dropout,
        "clock": record.clock,
        "provenance": {
            "kind": "training checkpoint",
            "name": f"{path.resolve().parent.name}/{path.name}",
            "sha256": sha256_of(path / checksums.FILE_NAME),
        },
    }
    metadata = parse_metadata(values, path / "run.json")
    kind = metadata.calibrated_for
    calibrated = {
        name: entry
        for name, entry in stored(path).items()
        if entry.weights == kind and weights == kind
    }
    source = Source(
        where=str(path),
        metadata=metadata,
        shapes=shapes,
        read=lambda name: checkpoint.read(f"buffers/{name}") if name in buffers else read(name),
        thresholds=calibrated,
        run=path.resolve().parent,
    )
    return source if not config.lora.rank else _unmerged(source, config)


def _unmerged(source: Source, config: Config) -> Unmerged:
    with torch.device("meta"):
        network = DiT(config.model, config.moe, align=config.align, lora=config.lora)
    frozen = frozen_names(network, config.training)
    return Unmerged(
        **vars(source),
        lora=config.lora,
        trained=frozenset(source.shapes) - frozen,
        base=config.training.init and Path(config.training.init).name,
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--weights ema:{text}: STD must be a number, as in ema:0.10") from None
