"""The whole chain with an autoencoder that has learned something: images, shards, draws, images."""

import numpy as np
import pytest
import torch

from diffmoe.data.autoencoders import DiffusersAutoencoder, autoencoder_of
from diffmoe.data.latents import model_latents
from diffmoe.data.reading import read_shard
from diffmoe.prepare.image_folders import find_images, load_image
from diffmoe.seeding import keyed_generator
from tests.helpers.encoding import encode
from tests.helpers.shards import build_vae

SIZE = 16


@pytest.fixture(scope="module")
def pixels(photos):
    """Every photograph by key, uint8 (16,16,3)."""
    return {item.key: load_image(item, SIZE) for item in find_images(photos)[0]}


@pytest.fixture(scope="module")
def trained(pixels, tmp_path_factory):
    """An autoencoder fitted to the photographs and their mirror images."""
    model = build_vae(width=12)
    x = torch.from_numpy(np.stack(list(pixels.values()))).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = torch.cat([x, x.flip(3)])
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(130):
        batch = x[torch.randint(len(x), (12,), generator=generator)]
        posterior = model.encode(batch).latent_dist
        error = (model.decode(posterior.sample(generator)).sample - batch).pow(2).mean()
        optimizer.zero_grad()
        (error + 1e-6 * posterior.kl().mean()).backward()
        optimizer.step()
    with torch.no_grad():
        z = model.encode(x).latent_dist.mean
    model.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_images_come_back_through_shards_and_draws(photos, pixels, trained, tmp_path):
    manifest = encode(photos, tmp_path, vae=trained, size=SIZE, shards=3)
    samples = [s for shard in manifest.shards for s in read_shard(tmp_path / shard.name, manifest)]
    wanted = np.stack([pixels[sample.key] for sample in samples]).astype(float)

    def error(manifest, arrays, autoencoder=None, wanted=wanted):
        """Root of the mean squared error, in levels of 0..255."""
        latents = model_latents(arrays, manifest, keyed_generator(0))
        decoded = (autoencoder or autoencoder_of(manifest.latent_spec)).decode(latents)
        return float(np.sqrt(((decoded.numpy() - wanted) ** 2).mean()))

    plain = [sample.array for sample in samples]
    right = error(manifest, plain)
    assert right < 25
    assert error(manifest, [s.flip for s in samples], wanted=wanted[:, :, ::-1]) < 1.2 * right
    # Each of these mistakes shows.
    assert error(manifest, plain, wanted=wanted[..., ::-1]) > 1.7 * right  # BGR
    assert error(manifest, plain, wanted=wanted[:, :, ::-1]) > 1.7 * right  # mirrored
    assert error(manifest, plain, wanted=wanted.swapaxes(1, 2)) > 1.7 * right  # transposed
    halves = DiffusersAutoencoder(trained, manifest.scale, manifest.shift, pixel_range=(0.0, 1.0))
    assert error(manifest, plain, halves) > 1.7 * right
    # The latents that the model sees are whitened.
    latents = model_latents(plain, manifest, keyed_generator(0))
    assert latents.std().item() == pytest.approx(1, rel=0.1)
