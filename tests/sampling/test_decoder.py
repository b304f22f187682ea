"""--decoder: code of the user's decodes a model's latents, and none that the data name."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffmoe.data.autoencoders import autoencoder_of
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.latent_spec import LatentSpec
from diffmoe.pipeline import Pipeline
from tests.helpers.models import exported
from tests.helpers.tiny import tiny_config
from tests.helpers.tools import command, told

LATENTS = {"shape": (4, 8, 8), "scale": [0.5, 1.0, 2.0, 1.0], "shift": 0.25,
           "autoencoder": "somewhere/else", "pixel_range": (0.0, 1.0)}  # fmt: skip
NAME = f"{__name__}:enlarged"


def enlarged(z: Tensor) -> Tensor:
    """Three of the four channels, twice as high and wide, from 0 to 1."""
    return z[:, 1:].sigmoid().repeat_interleave(2, 2).repeat_interleave(2, 3)


class Enlarging(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z[:, 1:].sigmoid().repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    torch.jit.script(Enlarging()).save(folder / "decoder.pt")
    return exported(folder / "model", tiny_config(model__in_channels=4), latents=LATENTS)


def test_a_script_and_a_function_decode_what_the_sampler_gives(model: Path, tmp_path: Path):
    script = str(model.parent / "decoder.pt")
    pipeline = Pipeline(model, device="cpu", decoder=script)
    images = np.stack([np.asarray(image) for image in pipeline([1, 3], steps=2, guidance=2)])
    assert images.shape == (2, 16, 16, 3)
    settings = SamplingSettings(steps=2, guidance=2)
    x = pipeline.sampler.latents([1, 3], settings)
    z = x / torch.tensor(LATENTS["scale"]).view(4, 1, 1) + 0.25
    expected = (enlarged(z) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - expected).max() <= 0.51
    other = Pipeline(model, device="cpu", decoder=NAME)([1, 3], steps=2, guidance=2)
    assert np.array_equal(np.stack([np.asarray(image) for image in other]), images)

    words = ["tools/sample.py", model, "--steps", "2", "--guidance", "2", "--decoder", script]
    told(*words, "--classes", "1,3", "--per-class", "1", "--out", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size[1] == 32  # a row each
    told(*words, "--num-samples", "4", "--out", tmp_path / "folder")
    recorded = json.loads((tmp_path / "folder" / "samples.json").read_text())["model"]
    assert recorded["decoder"] == script
    assert len(recorded["decoder_sha256"]) == 64


def test_without_it_a_model_of_other_latents_says_what_to_give(model: Path):
    done = command("tools/sample.py", model, "--steps", "2")
    assert done.returncode == 2
    assert "or what decodes its latents as --decoder" in done.stderr


def test_code_that_the_data_name_is_never_run(tmp_path: Path):
    """A manifest or an exported model comes from elsewhere: there the name is only a name."""
    torch.jit.script(Enlarging()).save(tmp_path / "decoder.pt")
    for name in (str(tmp_path / "decoder.pt"), NAME):
        spec = LatentSpec(**{**LATENTS, "autoencoder": name})
        with pytest.raises(UserError, match=f"it is a program.*--decoder {re.escape(name)}"):
            autoencoder_of(spec)
        assert autoencoder_of(spec, decoder=name).decode(torch.zeros(1, 4, 8, 8)).shape[3] == 3


@pytest.mark.parametrize(
    ("decoder", "told"),
    [
        ("absent.pt", "absent.pt is missing"),
        ("tests.sampling.test_decoder:absent", "cannot be imported"),
        ("torch:zeros_like", r"of latents \(1, 4, 8, 8\) it made \(1, 4, 8, 8\); images are"),
    ],
)
def test_what_is_no_decoder_is_refused(decoder: str, told: str):
    with pytest.raises(UserError, match=told):
        autoencoder_of(LatentSpec(**LATENTS), decoder=decoder).decode(torch.zeros(1, 4, 8, 8))
