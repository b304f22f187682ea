"""A fresh run that starts from an exported model's weights, such as an upcycled one."""

from pathlib import Path

import deepspeed
import torch

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.export.exported_model import ExportedModel, is_exported
from diffmoe.export.tensors import check_state_dict
from diffmoe.hash_cache import cached_sha256
from diffmoe.models.dit import DiT
from diffmoe.models.moe import ROUTING_STATE
from diffmoe.parallel.zero import owned_ranges


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
    there, now = model.metadata.model.model_dump(), config.model.model_dump()
    differing = [f"model.{key}: {there[key]} there, {now[key]} now" for key in now]
    differing = [line for key, line in zip(now, differing, strict=True) if there[key] != now[key]]
    if differing:
        raise UserError(
            f"training.init={path} does not fit this run's network: {'; '.join(differing)}"
        )
    check_state_dict(model.shapes, config.model, config.moe, f"training.init={path}")


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
