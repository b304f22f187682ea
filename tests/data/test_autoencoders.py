import sys
from types import SimpleNamespace

import pytest
import torch

from diffmoe.data.autoencoders import load_autoencoder, to_uint8
from diffmoe.errors import UserError


def test_uint8_rounds_to_the_nearest_level_and_clamps():
    levels = torch.arange(256, dtype=torch.float32)
    back = to_uint8((levels / 127.5 - 1).reshape(1, 1, 16, 16))
    assert torch.equal(back.flatten(), levels.to(torch.uint8))
    ends = to_uint8(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).reshape(1, 1, 1, 5))
    assert ends.flatten().tolist() == [0, 0, 128, 255, 255]


def test_pixels_that_are_no_numbers_are_no_black_image():
    with pytest.raises(UserError, match="gave NaN pixels"):
        load_autoencoder("identity").decode(torch.full((1, 1, 2, 2), torch.nan))


def test_pixels_decode_to_themselves_channels_last():
    latents = torch.zeros(2, 3, 4, 5)
    latents[:, 0], latents[:, 2] = 1, -1
    images = load_autoencoder("identity").decode(latents)
    assert images.shape == (2, 4, 5, 3)
    assert images.dtype == torch.uint8
    assert images[1, 2, 3].tolist() == [255, 128, 0]


def test_decoding_undoes_shift_and_scale_per_channel():
    scale, shift = [2.0, 0.5], [1.0, -1.0]
    pixels = torch.rand(3, 2, 4, 4) * 2 - 1
    latents = torch.stack([(pixels[:, c] - shift[c]) * scale[c] for c in (0, 1)], dim=1)
    # Off the rounding borders of to_uint8 the two agree; one level covers the fp32 rounding.
    difference = load_autoencoder("identity", scale, shift).decode(latents).int() - to_uint8(pixels)
    assert difference.abs().max() <= 1


def test_missing_diffusers_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r'pip install "diffmoe\[vae\]"'):
        load_autoencoder("stabilityai/sd-vae-ft-ema")


def test_latents_are_decoded_in_batches(monkeypatch):
    seen = []

    class Stub(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, path, **options):
            assert path == "folder"
            return cls()

        def decode(self, z):
            seen.append(len(z))
            return SimpleNamespace(sample=z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))

    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=Stub))
    latents = torch.full((35, 4, 2, 2), 0.18215)
    images = load_autoencoder("folder", scale=0.18215).decode(latents)
    assert seen == [16, 16, 3]
    assert images.shape == (35, 16, 16, 3)
    assert images.unique().tolist() == [255]  # 0.18215 / 0.18215 = 1
