"""Measures by how much diffusers' predictions differ for a folder that was written for it."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.conversion.hugging_face import CLASS, PIPELINE
from diffmoe.errors import UserError
from diffmoe.export.metadata import Metadata
from diffmoe.export.sources import Source
from diffmoe.export.tensors import empty_network, fill
from diffmoe.seeding import keyed_generator

# Code that makes it exact: diffusers' configuration has no field for this.
_EXACT = """for module in transformer.modules():
    if hasattr(module, "downscale_freq_shift"):
        module.downscale_freq_shift = 0
"""
_TIMESTEPS = (0, 1, 10, 100, 250, 500, 750, 999)
# Relative to the largest prediction: rounding; a wrong weight changes far more.
_ROUNDING = 1e-4


class Difference(NamedTuple):
    """The largest differences between the source's predictions and diffusers'.

    plain: as diffusers loads the folder. exact: with the code above. scale: the source's largest
    prediction.
    """

    plain: float
    exact: float
    scale: float


@torch.inference_mode()
def measure_difference(source: Source, folder: Path, rows: int) -> Difference | None:
    """Run both networks on one batch, in fp32. None if diffusers is not installed.

    rows: of diffusers' label table, of which the null label's is the last.

    Raises UserError if they differ by more than rounding even with the code above.
    """
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError:
        return None
    metadata = source.metadata
    network = empty_network(metadata.model, metadata.moe)
    fill(network, lambda name, _: source.read(name))
    null = metadata.model.num_classes
    x = torch.randn(
        (len(_TIMESTEPS), *metadata.model.latent_shape),
        generator=keyed_generator("difference to diffusers"),
    )
    t, y = torch.tensor(_TIMESTEPS), torch.arange(len(_TIMESTEPS)) % (null + 1)
    theirs = torch.where(y == null, rows - 1, y)
    expected = network(x, t, y).prediction
    del network
    other = DiTTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()

    def largest(tensor: Tensor) -> float:
        return float(tensor.abs().max())

    plain = largest(other(x, t, theirs).sample - expected)
    for module in other.modules():
        if hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = 0
    found = Difference(plain, largest(other(x, t, theirs).sample - expected), largest(expected))
    if found.exact > _ROUNDING * max(1.0, found.scale):
        raise UserError(
            f"{source.where}: diffusers' predictions differ by up to {found.exact:.3g} with DiT's "
            "timestep frequencies, too; nothing was kept"
        )
    return found


def describe(found: Difference | None) -> str:
    """The difference in words, for the user and for README.md of the folder."""
    cause = (
        "diffusers spaces the timestep frequencies differently from DiT and this model "
        "(downscale_freq_shift=1 instead of 0), and its configuration has no field for that"
    )
    if found is None:
        return (
            f"{cause}. The difference was not measured, since diffusers is not installed; the code "
            "in README.md makes it exact"
        )
    return (
        f"{cause}: predictions up to {found.scale:.3g} differ by up to {found.plain:.3g}. The code "
        f"in README.md reduces that to {found.exact:.1g}"
    )


def readme(found: Difference | None, metadata: Metadata, with_vae: bool) -> str:
    """README.md of the folder. with_vae: whether the autoencoder lies in it."""
    about = describe(found).replace("README.md", "this file")
    if metadata.latents.autoencoder == "identity":
        code = f"""from diffusers import {CLASS}

transformer = {CLASS}.from_pretrained("PATH OF THIS FOLDER")
{_EXACT}"""
    else:
        vae = ""
        if not with_vae:
            vae = f', vae=AutoencoderKL.from_pretrained("{metadata.latents.autoencoder}")'
        if metadata.guidance == 1:
            about += ".\n\nTrained without label dropout, the model cannot be guided: "
            about += "keep guidance_scale=1"
        code = f"""from diffusers import AutoencoderKL, {PIPELINE}

pipeline = {PIPELINE}.from_pretrained("PATH OF THIS FOLDER"{vae})
transformer = pipeline.transformer
{_EXACT}images = pipeline(
    class_labels=[0], guidance_scale={metadata.guidance:g}, num_inference_steps=50
).images
"""
    return f"""# {CLASS}

Written by DiffMoE. {about}.

```python
{code}```
"""
