"""A fresh run that starts from an exported model's weights, such as an upcycled one."""

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.export.exported_model import ExportedModel, is_exported
from diffmoe.export.metadata import Metadata
from diffmoe.export.tensors import check_state_dict
from diffmoe.hash_cache import cached_sha256
from diffmoe.models.dit import DiT
from diffmoe.models.moe import ROUTING_STATE
from diffmoe.parallel.zero import owned_ranges
from diffmoe.training.resume import SHAPE, dotted, within


def check(config: Config) -> None:
    """Hold training.init, if it is set, against the configuration; reads no tensors.

    Raises UserError naming what differs.
    """
    if config.training.init is None:
        return
    path = Path(config.training.init)
    if not is_exported(path):
        raise UserError(
            f"training.init={path} is not an exported model; make one: python "
            "tools/convert_checkpoint.py FROM TO"
        )
    model = ExportedModel(path)
    differing = _differing(model, config, shape=True)
    if differing:
        lines = [f"{key}: {there} there, {now} now" for key, (there, now) in differing.items()]
        way_out = " ".join(f"{key}={there}" for key, (there, _) in differing.items())
        if model.metadata.moe.type == "dense" and "moe.type" in differing:
            way_out += (
                f", or turn it into a mixture: python tools/convert_checkpoint.py {path} TO "
                f"--upcycle --experts {config.moe.experts}"
            )
        raise UserError(
            f"training.init={path} does not fit this run's network: {'; '.join(lines)}. Give "
            f"{way_out}"
        )
    check_state_dict(model.shapes, config.model, config.moe, f"training.init={path}")


def note(config: Config) -> str:
    """Where the weights come from, and which other settings of the network differ there."""
    assert config.training.init is not None
    model = ExportedModel(Path(config.training.init))
    differing = _differing(model, config, shape=False)
    lines = [f"{key}: {there} there, {now} now" for key, (there, now) in differing.items()]
    return "; ".join([f"starts from the weights of {model.folder}", *lines])


def _differing(model: ExportedModel, config: Config, shape: bool) -> dict[str, tuple[str, str]]:
    """Settings of the network that differ: (the model's, the run's), as the command line has them.

    shape: those that decide the network's tensors, or the others.
    """

    def settings(one: Config | Metadata) -> dict[str, Any]:
        sections = {"model": one.model.model_dump(), "moe": one.moe.model_dump()}
        if one.moe.type == "dense":
            sections["moe"] = {"type": "dense"}
        return {
            key: value for key, value in dotted(sections).items() if within(key, SHAPE) == shape
        }

    there, now = settings(model.metadata), settings(config)
    return {
        key: (_text(there[key]), _text(now.get(key, "not set")))
        for key in there
        if there[key] != now.get(key, "not set")
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@torch.no_grad()
def load(path: Path, engine: deepspeed.DeepSpeedEngine, network: DiT) -> None:
    """Fill this rank's fp32 masters, the weights and the routing's state. Averages start there,
    too, if they are made afterwards. Raises UserError where a file is damaged.
    """
    model = ExportedModel(path)
    model.verify(cached_sha256)
    for owned in owned_ranges(engine, network, network.expert_parameters()):
        flat = model.read(owned.name).view(-1)
        owned.master.copy_(flat[owned.start : owned.start + len(owned.master)])
    engine.optimizer.update_lp_params()
    for name, buffer in network.state_dict().items():
        if name.endswith(ROUTING_STATE):
            buffer.copy_(model.read(name))
