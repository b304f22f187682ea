"""What diffusers computes from a folder that was written for it, and how that differs."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.conversion.hugging_face import CLASS
from diffmoe.errors import UserError
from diffmoe.export.sources import Source
from diffmoe.export.tensors import empty_network, fill
from diffmoe.seeding import keyed_generator

# The lines that make it exact: diffusers' configuration has no field for this.
EXACT = f"""from diffusers import {CLASS}

transformer = {CLASS}.from_pretrained("PATH OF THIS FOLDER")
for module in transformer.modules():
    if hasattr(module, "downscale_freq_shift"):
        module.downscale_freq_shift = 0
"""
_TIMESTEPS = (0, 1, 10, 100, 250, 500, 750, 999)
# Of the largest prediction: rounding, far from what a wrong weight does.
_ROUNDING = 1e-4


class Difference(NamedTuple):
    """Largest, between the source's predictions and diffusers'.

    plain: as diffusers loads the folder. exact: with the lines above. reach: of the source's
    predictions themselves, the largest.
    """

    plain: float
    exact: float
    reach: float


@torch.inference_mode()
def measured(source: Source, folder: Path) -> Difference | None:
    """Both networks on one batch of timesteps, in fp32; None where diffusers is not installed.

    Raises UserError where they differ by more than rounding with the lines above, too.
    """
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError:
        return None
    about = source.about
    network = empty_network(about.model, about.moe)
    fill(network, lambda name, _: source.read(name))
    size, labels = about.model.input_size, about.model.num_classes + 1
    x = torch.randn(
        (len(_TIMESTEPS), about.model.in_channels, size, size),
        generator=keyed_generator("difference to diffusers"),
    )
    t, y = torch.tensor(_TIMESTEPS), torch.arange(len(_TIMESTEPS)) % labels
    expected = network(x, t, y).prediction
    del network
    theirs = DiTTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()

    def largest(tensor: Tensor) -> float:
        return float(tensor.abs().max())

    plain = largest(theirs(x, t, y).sample - expected)
    for module in theirs.modules():
        if hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = 0
    found = Difference(plain, largest(theirs(x, t, y).sample - expected), largest(expected))
    if found.exact > _ROUNDING * max(1.0, found.reach):
        raise UserError(
            f"{source.where}: diffusers computes something else from it, by up to {found.exact:.3g}"
            " with DiT's timestep frequencies; nothing was kept"
        )
    return found


def in_words(found: Difference | None) -> str:
    """For the user, and README.md of the folder."""
    told = (
        "diffusers spaces the frequencies of timesteps otherwise than DiT and this model "
        "(downscale_freq_shift=1 for 0), and its configuration has no field for that"
    )
    if found is None:
        return (
            f"{told}. By how much predictions differ was not measured, since diffusers is not "
            "installed; the code in README.md makes it exact"
        )
    return (
        f"{told}: predictions differ by up to {found.plain:.3g} where they reach {found.reach:.3g}."
        f" The code in README.md makes that {found.exact:.1g}"
    )


def readme(found: Difference | None) -> str:
    return f"""# {CLASS}

Written by DiffMoE. {in_words(found).replace("README.md", "this file")}.

```python
{EXACT}```
"""
