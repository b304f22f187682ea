"""check_data.py notices images that are one color, or nearly all black or white."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe.data.autoencoders import DiffusersAutoencoder
from diffmoe.data.packing import ShardWriter
from diffmoe.digits.mnist import mnist_digits
from diffmoe.prepare.checking import check_data
from tests.helpers.encoding import encode
from tests.helpers.shards import FIELDS, photograph

PIXELS = FIELDS | {"shape": (3, 8, 8)}


def clipped() -> np.ndarray:
    """What a reader that clips makes of a gray ramp of 16 bits: 99.6 % white."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    return np.broadcast_to(np.minimum(ramp, 255).astype(np.uint8), (3, 8, 8))


def photo(index: int) -> np.ndarray:
    return np.asarray(photograph(index, 8, 8)).transpose(2, 0, 1)


def write(directory, images, dtype="uint8", **changes) -> None:
    with ShardWriter(directory, [len(images)], **PIXELS | {"dtype": dtype} | changes) as writer:
        for index, image in enumerate(images):
            array = image if dtype == "uint8" else (image / 127.5 - 1).astype(dtype)
            writer.add(f"{index:03d}", index % 7, array)


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
@pytest.mark.parametrize(
    ("flat", "told"),
    [
        (clipped(), "saturated (98% or more of it black, or white)"),
        (np.zeros((3, 8, 8), np.uint8), "one color"),
        (np.full((3, 8, 8), 255, np.uint8), "one color"),
        (np.full((3, 8, 8), 77, np.uint8), "one color"),
        (np.arange(3, dtype=np.uint8).repeat(64).reshape(3, 8, 8), "one color"),
    ],
)
def test_saturated_and_constant_images_are_problems(tmp_path, dtype, flat, told):
    write(tmp_path, [photo(index) for index in range(9)] + [flat], dtype)
    (problem,) = check_data(tmp_path, None).problems
    assert problem.startswith("1 of 10 images (10.0%)")
    assert told in problem
    assert "such as 009" in problem


def test_a_few_among_many_are_told_but_are_no_problem(tmp_path):
    """Photographs may be black by mistake; a data set is not."""
    write(tmp_path, [photo(index) for index in range(200)] + [np.zeros((3, 8, 8), np.uint8)])
    report = check_data(tmp_path, None)
    assert report.problems == []
    assert "1 of 201 images (0.5%) are one color, such as 200" in str(report)


def test_photographs_digits_and_drawings_are_neither(photos, tmp_path):
    encode(photos, tmp_path / "photos", vae=None, size=16, shards=1)
    assert "images (" not in str(check_data(tmp_path / "photos", None))
    digits, _ = mnist_digits()
    thinnest = digits[np.argsort((digits > 0).sum((1, 2)))[:50]]
    write(tmp_path / "digits", list(thinnest[:, None]), shape=(1, 28, 28))
    assert "images (" not in str(check_data(tmp_path / "digits", None))


def test_latents_that_are_the_same_everywhere_are_noticed(tmp_path):
    fields = {"content": "mean_logvar", "autoencoder": "some/vae", "scaled": False, "scale": 0.2}
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path, [20], **PIXELS | fields) as writer:
        for index in range(20):
            mean = rng.normal(0, 5, (3, 8, 8)) if index < 10 else np.full((3, 8, 8), 5)
            moments = np.concatenate([mean, rng.uniform(-5, -4, (3, 8, 8))])
            writer.add(f"{index:03d}", index % 7, moments.astype(np.float32))
    problem = check_data(tmp_path, None).problems[0]
    assert "10 of 20 images (50.0%) are one color, such as 010" in problem


def test_images_behind_an_autoencoder_are_looked_at_on_the_sheet(tmp_path, tiny_vae, monkeypatch):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for index in range(8):
        Image.fromarray(photo(index).transpose(1, 2, 0)).resize((16, 16)).save(
            tmp_path / "images" / "a" / f"{index}.png"
        )
    encode(tmp_path / "images", tmp_path / "data", vae=str(tiny_vae), size=16, shards=1)
    white = lambda self, latents: torch.full((len(latents), 16, 16, 3), 255).byte()  # noqa: E731
    monkeypatch.setattr(DiffusersAutoencoder, "decode", white)
    problems = check_data(tmp_path / "data", tmp_path / "sheet.png").problems
    assert any("8 of the 8 images on the contact sheet are" in problem for problem in problems)
