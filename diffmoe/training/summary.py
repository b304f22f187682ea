"""What a run says of itself: where and what it trains at its start, what to do at its end."""

import shlex
from collections.abc import Sequence

import torch

from diffmoe.capacity.meter import activated_parameters
from diffmoe.config import Config
from diffmoe.data.manifest import Manifest
from diffmoe.models.dit import DiT


def beginning(config: Config, network: DiT, device: torch.device, manifest: Manifest) -> str:
    """Device, ranks, parameters, data and output, in one line."""
    moe, world = config.moe, network.topology.world
    capacity = None if moe.type == "dense" else moe.top_k if moe.chosen_by_tokens else moe.capacity
    active, total = activated_parameters(network, capacity), network.parameter_count()
    counted = f"{total / 1e6:.2f} million parameters"
    if capacity is not None:
        counted += f", of which {active / 1e6:.2f} million work on an average token"
    trained = [name for name, one in network.named_parameters() if one.requires_grad]
    if len(trained) < len(list(network.parameters())):
        counted += f"; {network.parameter_count(trained) / 1e6:.2f} million train"
    where = f"{world} rank{'s' if world > 1 else ''} on {device.type}, {config.training.precision}"
    return (
        f"{where}; {counted}; {manifest.samples:,} samples of {config.data.path}; "
        f"output {config.output}"
    )


def ending(config: Config, class_names: Sequence[str] | None, trained: bool) -> str:
    """What to do with a finished run. trained: False where it had nothing left to do."""
    if config.model.text is not None:
        what = "--prompt CAPTION"
    else:
        names = class_names or [str(number) for number in range(config.model.num_classes)]
        what = f"--classes {shlex.quote(','.join(names[:3]))}"
    output = shlex.quote(config.output)
    lines = [f"next: python tools/sample.py {output} {what} --guidance 2 --steps 50 --out grid.png"]
    if not trained:
        lines.insert(
            0,
            f"{config.output} has already been trained on {config.training.total_samples:,} "
            "samples: nothing to do; set training.total_samples higher to go on, or another output",
        )
    return "\n".join(lines)
