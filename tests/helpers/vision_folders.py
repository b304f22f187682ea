"""Tiny vision models with random weights, saved as transformers saves real ones."""

from pathlib import Path

import torch
import transformers

MEAN, DEVIATION = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def save_dinov2(folder: Path, registers: bool = False, seed: int = 0) -> Path:
    """For images of 28x28 pixels in patches of 14, as DINOv2's."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"image_size": 28, "patch_size": 14, "mlp_ratio": 2}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=4)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    transformers.BitImageProcessor(
        image_mean=MEAN, image_std=DEVIATION, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder)
    return folder
