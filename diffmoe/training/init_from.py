"""A fresh run that starts from the weights of any model, adapted where the two differ."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from diffmoe.checkpoints.folder import names
from diffmoe.checkpoints.run_file import read_run_file
from diffmoe.config import Config
from diffmoe.conversion.adapting import Adapted, adapt
from diffmoe.conversion.detect_format import open_source
from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from diffmoe.export.exported_model import ExportedModel, is_exported
from diffmoe.export.sources import Source
from diffmoe.hash_cache import cached_sha256
from diffmoe.models.alignment import is_of_projector
from diffmoe.models.dit import DiT
from diffmoe.models.frozen import frozen_names
from diffmoe.models.lora import is_factor
from diffmoe.models.moe import ROUTING_STATE
from diffmoe.parallel.engine import Engine
from diffmoe.parallel.zero import owned_ranges


def with_rope_grid(config: Config, checkpoint: Path | None) -> Config:
    """With the grid that rotary angles are made for, where model.rope_grid leaves it open.

    That of the checkpoint that the run goes on from; of a fresh one, that of training.init's model.
    None stands where it is the network's own.
    """
    if not config.model.rope or config.model.rope_grid is not None:
        return config
    if checkpoint is not None:
        grid = read_run_file(checkpoint).config["model"].get("rope_grid")
    elif config.training.init is not None:
        with _source(Path(config.training.init), verify=False) as source:
            grid = source.metadata.model.rotary_grid
    else:
        return config
    if grid is None or tuple(grid) == config.model.grid:
        return config
    return config.replace({"model.rope_grid": grid})


def check(config: Config, manifest: Manifest) -> None:
    """Hold training.init, if a fresh run starts from it, against the configuration and its data.

    Raises UserError naming what cannot be adapted, and what LoRA would leave at random values.
    """
    if names(Path(config.output)):
        return
    if config.training.init is None:
        if config.lora.rank:
            raise UserError(
                f"lora.rank={config.lora.rank} trains factors beside the weights of a model, and "
                "training.init names none; give a run or a model, training.init=PATH"
            )
        return
    with _adapted(config, manifest) as adapted:
        if config.lora.rank:
            _check_new_parts(config, adapted)


def _check_new_parts(config: Config, adapted: Adapted) -> None:
    with torch.device("meta"):
        network = DiT(config.model, config.moe, align=config.align, lora=config.lora)
    stuck = sorted(frozen_names(network, config.training) & (adapted.fresh | adapted.partly))
    if stuck:
        parts = dict.fromkeys(name.rpartition(".")[0] + ".*" for name in stuck)
        wanted = ", ".join((*config.training.train_only, *parts))
        raise UserError(
            f"training.init={config.training.init}: {stuck[0]} starts anew, and with lora.rank="
            f"{config.lora.rank} it would stay so; add training.train_only='[{wanted}]'"
        )


@torch.no_grad()
def load(config: Config, manifest: Manifest, engine: Engine, network: DiT) -> tuple[str, ...]:
    """Fill this rank's fp32 masters, the weights and the routing's state. Averages start there,
    too, if they are made afterwards. Raises UserError where a file is damaged.

    Returns a line for each difference between the model and the run's network.
    """
    with _adapted(config, manifest, verify=True) as adapted:
        for owned in owned_ranges(engine, network, network.expert_parameters()):
            if is_of_projector(owned.name) or is_factor(owned.name):  # which start as they do
                continue
            if owned.name not in adapted.fresh:
                flat = adapted.read(owned.name).reshape(-1)
                owned.master.copy_(flat[owned.start : owned.start + len(owned.master)])
        engine.spread_masters()
        for name, buffer in network.state_dict().items():
            if name.endswith(ROUTING_STATE) and name not in adapted.fresh:
                buffer.copy_(adapted.read(name))
    return adapted.notes


@contextlib.contextmanager
def _adapted(config: Config, manifest: Manifest, verify: bool = False) -> Iterator[Adapted]:
    assert config.training.init is not None
    with _source(Path(config.training.init), verify) as source:
        yield adapt(source, config, manifest.class_names)


@contextlib.contextmanager
def _source(path: Path, verify: bool) -> Iterator[Source]:
    try:
        if is_exported(path):  # whose files are read once per machine, and here not at all
            model = ExportedModel(path)
            if verify:
                model.verify(cached_sha256)
            yield Source(f"training.init={path}", model.metadata, model.shapes, model.read)
            return
        with open_source(path) as source:
            yield source
    except UserError as error:
        told = str(error)
        raise UserError(
            told if told.startswith("training.init=") else f"training.init={path}: {told}"
        ) from None
