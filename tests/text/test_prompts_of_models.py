"""Images of captions: what guidance leads away from, what a folder tells, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import diffmoe
from diffmoe.capacity.forward import Forward
from diffmoe.clock import Clock
from diffmoe.conditions import Text
from diffmoe.data.autoencoders import PixelAutoencoder
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.export.open import open_network
from diffmoe.latent_spec import LatentSpec
from diffmoe.sampling.many_images import SampleRequest, shard_arrays
from diffmoe.sampling.sampler import Origin, Sampler
from diffmoe.text.prompts import Prompts, create_prompts, encoder_of, read_captions
from tests.helpers.models import exported
from tests.helpers.networks import network_of
from tests.helpers.sampling import latents_of
from tests.helpers.tiny import BYTES, tiny_config

CONFIG = tiny_config(model__in_channels=3, model__text=BYTES)
CLASSES = tiny_config(model__in_channels=3)
GUIDED = SamplingSettings(steps=3, guidance=2.5, seed=1)
CAPTIONS = ["red", "blue two", "none"]


def prompts(*captions: str, negative: str | None = None) -> Prompts:
    return create_prompts(CONFIG, encoder_of(CONFIG), captions or CAPTIONS, negative)


def latents(wanted: Prompts, labels: list[int], indices: list[int], settings=GUIDED, **options):
    return latents_of(
        network_of(CONFIG), CONFIG, labels, indices, settings, prompts=wanted, **options
    )


def test_an_image_depends_on_its_caption_and_number_alone():
    together = latents(prompts(), [0, 1, 2, 0], [0, 1, 2, 3])
    alone = latents(prompts("blue two"), [0], [1])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    assert (latents(prompts("blue one"), [0], [1]) - alone).abs().max() > 1e-3
    assert (together[0] - together[3]).abs().max() > 1e-3  # of one caption, but two noises


def unconditional_texts(wanted: Prompts) -> tuple[list[Text], list[bool]]:
    """What the network is given in the passes that guidance adds; which passes those were."""
    network, seen, added = network_of(CONFIG), [], []

    def watch(module, inputs) -> None:
        seen.append(inputs[2])

    network.register_forward_pre_hook(watch)

    def observe(forward: Forward) -> None:
        added.append(forward.unconditional)

    latents_of(network, CONFIG, [0, 1], [0, 1], GUIDED, prompts=wanted, observe=observe)
    return [text for text, is_added in zip(seen, added, strict=True) if is_added], added


def test_guidance_leads_away_from_the_null_caption_or_the_negative_prompt():
    texts, added = unconditional_texts(prompts())
    assert added == [False, True] * 3
    assert not any(text.mask_BL.any() for text in texts)
    texts, _ = unconditional_texts(prompts(negative="dim"))
    for text in texts:
        assert text.tokens[:, :3].tolist() == [list(b"dim")] * 2
        assert text.mask_BL.sum(dim=1).tolist() == [3, 3]
    plain, negative = (latents(prompts(negative=negative), [0], [0]) for negative in (None, "dim"))
    assert (plain - negative).abs().max() > 1e-3
    # Away from the caption itself there is nowhere to go.
    same = latents(prompts(negative="red"), [0], [0])
    unguided = latents(prompts(), [0], [0], SamplingSettings(steps=3, seed=1))
    torch.testing.assert_close(same, unguided, atol=1e-5, rtol=0)


def test_a_folder_tells_its_captions_and_is_not_gone_on_with_by_others(tmp_path):
    (tmp_path / "checksums.json").write_text("{}")
    spec = LatentSpec(shape=(2, 8, 8))
    origin = Origin(tmp_path, "ema", spec, (), Clock(samples=0, step=0, skipped=0))

    def make(wanted: Prompts):
        sampler = Sampler(network_of(CONFIG), CONFIG, PixelAutoencoder(), wanted, origin=origin)
        request = SampleRequest(5, (0, 1, 2))
        return sampler.folder(tmp_path / "out", request, GUIDED, shard_size=2)

    assert make(prompts(negative="dim")) is not None
    told = json.loads((tmp_path / "out/samples.json").read_text())
    assert told["captions"] == CAPTIONS
    assert told["negative_prompt"] == "dim"
    arrays = list(shard_arrays(tmp_path / "out"))
    labels = np.concatenate([some for _, some in arrays])
    assert [told["captions"][label] for label in labels] == [*CAPTIONS, *CAPTIONS[:2]]
    images = np.concatenate([images for images, _ in arrays])
    expected = PixelAutoencoder().decode(
        latents(prompts(negative="dim"), [0, 1, 2, 0, 1], range(5))
    )
    assert np.abs(images.astype(int) - expected.numpy()).max() <= 1
    for other in (prompts("red", "blue two", "some", negative="dim"), prompts()):
        with pytest.raises(UserError, match=r"captions|negative_prompt"):
            make(other)


def test_an_exported_text_model_makes_images_of_prompts(tmp_path):
    folder = exported(tmp_path / "model", CONFIG)
    pipeline = diffmoe.Pipeline(folder, device="cpu")
    images = pipeline(
        prompt=["red", "blue two"], negative_prompt="dim", seed=1, steps=3, guidance=2.5
    )
    assert [image.size for image in images] == [(8, 8)] * 2
    network = open_network(folder).network
    wanted = prompts("red", "blue two", negative="dim")
    expected = latents_of(network, CONFIG, [0, 1], [0, 1], GUIDED, prompts=wanted)
    assert np.array_equal(pixels(images), PixelAutoencoder().decode(expected).numpy())
    one = pipeline(prompt="red", negative_prompt="dim", seed=1, steps=3, guidance=2.5)
    assert np.abs(pixels(one).astype(int) - pixels(images[:1])).max() <= 1


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_a_file_of_prompts_is_read_as_any_editor_writes_it(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa r\u00e9d two\r\n\r\n  blue one \n".encode())
    assert read_captions(tmp_path / "prompts.txt") == ["a r\u00e9d two", "blue one"]


def test_prompts_and_classes_are_not_taken_for_each_other(tmp_path):
    of_text = diffmoe.Pipeline(exported(tmp_path / "text", CONFIG), device="cpu")
    of_classes = diffmoe.Pipeline(exported(tmp_path / "classes", CLASSES), device="cpu")
    for wanted in ({"labels": [1]}, {}, {"negative_prompt": "dim"}, {"prompt": []}):
        with pytest.raises(UserError, match="draws captions, not classes: give at least one"):
            of_text(**wanted)
    with pytest.raises(UserError, match=r"give labels=\[...\] to a model of classes, prompt=..."):
        of_text(labels=[0], prompt="red")
    for wanted in ({"prompt": "red"}, {"labels": [0], "negative_prompt": "dim"}):
        with pytest.raises(UserError, match=r"draws classes \(model.num_classes=5\)"):
            of_classes(**wanted)
    with pytest.raises(UserError, match="a negative prompt acts through guidance; set it above 1"):
        of_text(prompt="red", negative_prompt="dim", guidance=1.0)
    with pytest.raises(UserError, match="text encoder /t5: this model draws classes"):
        diffmoe.Pipeline(tmp_path / "classes", device="cpu", text_encoder="/t5")
    with pytest.raises(UserError, match="draws captions, not classes"):
        latents_of(network_of(CONFIG), CONFIG, [0], [0], GUIDED)
