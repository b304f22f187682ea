import subprocess
import sys

import diffusers
import pytest
import torch

from diffmoe.data import autoencoders
from diffmoe.data.autoencoders import (
    DiffusersAutoencoder,
    load_autoencoder,
    to_uint8,
    why_missing,
)
from diffmoe.errors import UserError
from tests.helpers.autoencoders import autoencoder, tiny
from tests.helpers.hub import COMMIT
from tests.helpers.processes import environment
from tests.helpers.ranks import ranks_of
from tests.helpers.runs import pack, run_config


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


def test_latents_are_decoded_in_batches(tmp_path, monkeypatch):
    model = load_autoencoder(str(autoencoder(tmp_path / "vae")), scale=0.5)
    seen, decode = [], model.model.decode
    monkeypatch.setattr(model.model, "decode", lambda z: seen.append(len(z)) or decode(z))
    latents = torch.randn(35, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    images = model.decode(latents)
    assert seen == [16, 16, 3]
    expected = decode(latents / 0.5).sample.clamp(-1, 1).permute(0, 2, 3, 1)
    assert (images / 127.5 - 1 - expected).abs().max() <= 0.51 / 127.5


@pytest.mark.parametrize(
    ("name", "scale", "shift", "draws"),
    [
        ("AutoencoderDC", 0.41, 0.0, False),
        ("AutoencoderTiny", 1.0, 0.0, False),
        ("AutoencoderRAE", 1.0, 0.0, False),
        ("AutoencoderKLQwenImage", [1.0, 0.5, 0.25, 0.125], [0.1, 0.2, 0.3, 0.4], True),
    ],
)
@torch.no_grad()
def test_any_autoencoder_of_diffusers_is_opened_by_its_class(
    name: str, scale, shift, draws: bool, tmp_path
):
    model = tiny(name).eval()
    model.save_pretrained(tmp_path / "ae")
    opened = DiffusersAutoencoder.with_own_scale(str(tmp_path / "ae"))
    assert (opened.scale, opened.shift) == (scale, shift)
    images = torch.randint(0, 256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(1))
    pixels = images.permute(0, 3, 1, 2) / 255
    if name != "AutoencoderRAE":  # which takes 0 to 1
        pixels = pixels * 2 - 1
    video = name == "AutoencoderKLQwenImage"
    encoded = model.encode(pixels[:, :, None] if video else pixels)
    latents = encoded.latent_dist.mean[:, :, 0] if draws else next(iter(encoded.values()))
    found = opened.encode(images.to(torch.uint8))
    torch.testing.assert_close(found[:, : latents.shape[1]], latents)
    assert opened.describe(32, 32) == (tuple(latents.shape[1:]), draws)
    # What the diffusion model would work on gives the autoencoder's own image of it.
    by, plus = (torch.as_tensor(value).reshape(-1, 1, 1) for value in (scale, shift))
    again = load_autoencoder(
        str(tmp_path / "ae"), opened.scale, opened.shift, pixel_range=opened.pixel_range
    )
    decoded = model.decode(latents[:, :, None] if video else latents).sample
    decoded = decoded[:, :, 0] if video else decoded
    levels = decoded if name == "AutoencoderRAE" else (decoded + 1) / 2
    expected = levels.clamp(0, 1).permute(0, 2, 3, 1) * 255
    assert (again.decode((latents - plus) * by) - expected).abs().max() <= 0.51


@torch.no_grad()
def test_the_latents_of_flux2_are_those_of_its_own_pipeline(tmp_path):
    """2x2 of z in one place, with the statistics of the batch norm that its weights hold."""
    pipeline = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2").Flux2Pipeline
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, layers_per_block=1,
    ).eval()  # fmt: skip
    model.bn.running_mean = torch.randn(12)
    model.bn.running_var = torch.rand(12) * 4
    model.save_pretrained(tmp_path / "ae")
    opened = DiffusersAutoencoder.with_own_scale(str(tmp_path / "ae"))
    assert opened.describe(32, 48) == ((12, 8, 12), True)
    with pytest.raises(UserError, match="--size 34x32 "):  # z is 17 high
        opened.describe(34, 32)
    images = torch.randint(0, 256, (2, 32, 48, 3), generator=torch.Generator().manual_seed(1))
    moments = opened.encode(images.to(torch.uint8))
    z = model.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    # As prepared for an image that conditions the pipeline.
    mean, deviation = (
        part.view(1, -1, 1, 1)
        for part in (model.bn.running_mean, (model.bn.running_var + 1e-4).sqrt())
    )
    wanted = (pipeline._patchify_latents(z.mean) - mean) / deviation
    shift, scale = (torch.tensor(part).view(-1, 1, 1) for part in (opened.shift, opened.scale))
    latents = (moments[:, :12] - shift) * scale
    torch.testing.assert_close(latents, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moments[:, 12:], pipeline._patchify_latents(z.logvar))
    # And back, as from its transformer.
    again = load_autoencoder(str(tmp_path / "ae"), opened.scale, opened.shift)
    back = pipeline._unpatchify_latents(wanted * deviation + mean)
    expected = (model.decode(back).sample.clamp(-1, 1).permute(0, 2, 3, 1) + 1) * 127.5
    assert (again.decode(latents) - expected).abs().max() <= 0.52


def test_a_subfolder_of_a_hub_id_is_found(tmp_path, monkeypatch):
    """In the hub's cache, as after a download."""
    snapshot = tmp_path / f"hub/models--some--pipeline/snapshots/{COMMIT}"
    autoencoder(snapshot / "vae", scale=0.7)
    (tmp_path / "hub/models--some--pipeline/refs").mkdir()
    (tmp_path / "hub/models--some--pipeline/refs/main").write_text(COMMIT)
    script = (
        "from diffmoe.data.autoencoders import DiffusersAutoencoder as A\n"
        "print(A.with_own_scale('some/pipeline/vae').scale)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["0.7"], done.stderr


def test_what_is_no_autoencoder_of_diffusers_is_named(tmp_path):
    diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    with pytest.raises(UserError, match="has no autoencoder UNet2DModel"):
        load_autoencoder(str(tmp_path / "unet"))


@pytest.mark.slow
def test_a_run_tells_at_its_start_that_its_images_cannot_be_decoded(tmp_path):
    data = pack(tmp_path / "data", shape=(4, 8, 8), autoencoder=str(tmp_path / "gone"))
    config = run_config(tmp_path, 1, data__path=str(data), model__in_channels=4)
    with ranks_of(config, 1) as ranks:
        assert ranks.wait() == [0], ranks.told()
        told = f"the autoencoder of the data, {tmp_path}/gone, cannot be opened (the folder is not"
        assert ranks.told().count(told) == 1


def test_a_short_look_says_what_is_missing(tmp_path, monkeypatch):
    assert why_missing("identity") is None
    assert why_missing(str(tmp_path)) is None
    assert why_missing("stabilityai/sd-vae-ft-ema") is None
    assert "is a program" in why_missing("elsewhere/decoder.pt")
    assert "is a program" in why_missing("package.module:function")
    assert "folder" in why_missing("/data/run:3/vae")  # a colon alone makes no program
    monkeypatch.setattr(autoencoders, "find_spec", lambda name: None)
    assert "pip install" in why_missing("stabilityai/sd-vae-ft-ema")
