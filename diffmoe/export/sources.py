"""What is converted: an About, and tensors by our names, one at a time.

Every kind of source gives one: our checkpoints and exported folders here, foreign files in
release.py and hugging_face.py; upcycling.py makes one of another.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from diffmoe.capacity.thresholds import Calibrated, stored
from diffmoe.checkpoints import checksums
from diffmoe.checkpoints.checksums import find_damage
from diffmoe.checkpoints.folder import find_complete
from diffmoe.checkpoints.inspect import StoredCheckpoint, open_checkpoint
from diffmoe.checkpoints.posthoc import combined_average
from diffmoe.errors import UserError
from diffmoe.export.autoencoder_folder import opened_from
from diffmoe.export.exported import ExportedModel
from diffmoe.export.metadata import Metadata, parse_metadata
from diffmoe.export.tensors import Read, Shapes, check_state_dict, finite
from diffmoe.files import sha256_of

_LATENTS = ("shape", "scale", "shift", "autoencoder", "pixel_range", "source")


@dataclass(frozen=True)
class Source:
    """A model that can be written.

    where: names it in errors. read: a tensor by name, in its shape of `shapes`. thresholds:
    calibrated ones that hold for these weights. run: the folder of the run, for its figures.
    notes: what its user should know.
    """

    where: str
    about: Metadata
    shapes: Shapes
    read: Read
    thresholds: dict[str, Calibrated] = field(default_factory=dict)
    run: Path | None = None
    notes: tuple[str, ...] = ()

    def checked(self) -> "Source":
        """Itself: all tensors there, none left over, and each is looked at for NaN when read."""
        check_state_dict(self.shapes, self.about.model, self.about.moe, self.where)
        return Source(**(self.__dict__ | {"read": self._finite}))

    def _finite(self, name: str) -> Tensor:
        return finite(name, self.read(name), self.where)


@contextlib.contextmanager
def exported_source(path: Path) -> Iterator[Source]:
    """An exported folder, to be written in another type or name; held against its checksums."""
    model = ExportedModel(path)
    model.verify()
    latents = opened_from(model.about.latents, path)
    about = model.about.model_copy(update={"latents": latents})
    yield Source(str(path), about, model.shapes, model.read, stored(path))


@contextlib.contextmanager
def checkpoint_source(path: Path, weights: str = "ema") -> Iterator[Source]:
    """A run's newest checkpoint, or a named one, of any number of ranks, P and ZeRO stage.

    weights: ema, live, or ema:STD, a power-function average put together from those of the run
    (path is then the run's folder). No retention deletes what is being read, and every file is
    held against its checksum.
    """
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
            raise UserError(f"{stored_there.path} holds no {kind} weights; take --weights {other}")

        def read(name: str) -> Tensor:
            return stored_there.read(f"{prefix}/{name}")

        yield _source(stored_there, kind, read)


def _source(checkpoint: StoredCheckpoint, weights: str, read: Callable[[str], Tensor]) -> Source:
    """read: parameters by name; thresholds are those of the checkpoint, never averaged."""
    path, record, config = checkpoint.path, checkpoint.record, checkpoint.config
    prefix = "weights" if weights == "live" else "ema"
    if not any(name.startswith(f"{prefix}/") for name in checkpoint.shapes):
        prefix = next(iter(checkpoint.prefixes))  # the lengths of a combination, alike in shapes
    shapes = {
        name.partition("/")[2]: shape
        for name, shape in checkpoint.shapes.items()
        if name.partition("/")[0] in (prefix, "buffers")
    }
    buffers = {name.partition("/")[2] for name in checkpoint.shapes if name.startswith("buffers/")}
    latents = record.latents
    values: dict[str, Any] = {
        "weights": weights,
        "model": config.model.model_dump(),
        "moe": config.moe.model_dump(),
        "diffusion": config.diffusion.model_dump(),
        "latents": {key: latents[key] for key in _LATENTS if key in latents},
        "class_names": latents.get("class_names"),
        "label_dropout": config.training.label_dropout,
        "clock": record.clock,
        "provenance": {
            "kind": "training checkpoint",
            "name": f"{path.resolve().parent.name}/{path.name}",
            "sha256": sha256_of(path / checksums.FILE_NAME),
        },
    }
    made = parse_metadata(values, path / "run.json")
    kind = made.calibrated_for
    calibrated = {
        name: entry
        for name, entry in stored(path).items()
        if entry.weights == kind and weights == kind
    }
    return Source(
        where=str(path),
        about=made,
        shapes=shapes,
        read=lambda name: checkpoint.read(f"buffers/{name}") if name in buffers else read(name),
        thresholds=calibrated,
        run=path.resolve().parent,
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--weights ema:{text}: STD is a number, such as ema:0.10") from None
