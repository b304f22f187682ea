"""Three lines of code that make images, in an environment without anything of training."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffmoe
from diffmoe.config import Config
from diffmoe.conversion.opening import open_network
from diffmoe.data.autoencoder import PixelAutoencoder
from diffmoe.errors import UserError
from diffmoe.inference.sampling import SamplingSettings, sample_latents
from diffmoe.inference.thresholds import Calibrated, store
from tests.conversion.models import NAMES, exported
from tests.training.commands import command, environment
from tests.training.runs import newest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("pipeline") / "out", class_names=NAMES)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_a_pipeline_gives_the_images_that_sampling_gives(folder: Path):
    pipeline = diffmoe.Pipeline(folder, device="cpu")
    images = pipeline(labels=[3, 0, 3], seed=5, steps=4, guidance=2)
    assert [(image.mode, image.size) for image in images] == [("RGB", (8, 8))] * 3
    snapshot = open_network(folder)
    latents = sample_latents(
        snapshot.network, snapshot.config, [3, 0, 3], range(3),
        SamplingSettings(steps=4, guidance=2, seed=5),
    )  # fmt: skip
    assert np.array_equal(pixels(images), PixelAutoencoder().decode(latents).numpy())
    assert len(np.unique(pixels(images))) > 50


def test_names_of_classes_are_as_good_as_numbers(folder: Path):
    pipeline = diffmoe.Pipeline(folder, device="cpu")
    by_name = pipeline(labels=["cat", "plane"], steps=2)
    assert np.array_equal(pixels(by_name), pixels(pipeline(labels=[3, 0], steps=2)))
    with pytest.raises(UserError, match="class 'dog' is unknown"):
        pipeline(labels=["dog"])
    with pytest.raises(UserError, match=r"class 5 is outside 0\.\.4"):
        pipeline(labels=[5])


def test_the_batch_and_its_size_change_no_image(folder: Path):
    pipeline = diffmoe.Pipeline(folder, device="cpu")
    together = pixels(pipeline(labels=[1, 2, 3], steps=3)).astype(int)
    apart = pixels(pipeline(labels=[1, 2, 3], steps=3, batch=1)).astype(int)
    assert np.abs(together - apart).max() <= 1  # products of other row counts round otherwise


def test_a_calibrated_capacity_is_chosen_by_its_number(folder: Path):
    pipeline = diffmoe.Pipeline(folder, device="cpu")
    usual = pixels(pipeline(labels=[1, 2], steps=2))
    with pytest.raises(UserError, match=r"run: python tools/calibrate\.py .*--capacity 0\.8"):
        pipeline(labels=[1], capacity=0.8)
    entry = Calibrated(
        weights="ema", capacity=0.8, measured=0.0, common=False, over="noise", samples=1,
        log_odds=[[100.0] * 4] * 2,
    )  # fmt: skip
    store(folder, "0.8", entry)
    without_experts = pixels(pipeline(labels=[1, 2], steps=2, capacity=0.8))
    assert not np.array_equal(without_experts, usual)
    assert np.array_equal(pixels(pipeline(labels=[1, 2], steps=2)), usual)


def test_a_run_is_as_good_as_an_export(single_run: Config):
    pipeline = diffmoe.Pipeline(single_run.output, device="cpu", weights="live")
    assert pipeline.folder == newest(single_run)
    assert len(pipeline(labels=["deer"], steps=2)) == 1


def test_bfloat16_makes_nearly_the_same_images(folder: Path):
    fp32 = diffmoe.Pipeline(folder, device="cpu")(labels=[1, 2], steps=4)
    bf16 = diffmoe.Pipeline(folder, device="cpu", dtype=torch.bfloat16)(labels=[1, 2], steps=4)
    difference = np.abs(pixels(fp32).astype(int) - pixels(bf16)).mean()
    assert 0 < difference < 5


def test_what_is_neither_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="is no complete checkpoint"):
        diffmoe.load(tmp_path)
    with pytest.raises(UserError, match="dtype float8: choose float32 or bfloat16"):
        diffmoe.load(tmp_path, dtype="float8")
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = diffmoe.Pipelin


BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("deepspeed", "megatron", "webdataset", "wandb"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import diffmoe, torch

assert "pydantic" not in sys.modules  # nothing comes unasked
network = diffmoe.load(sys.argv[1], device="cpu")
with torch.no_grad():
    network(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("diffmoe.")}
print(" ".join(sorted(rooms)))
print(diffmoe.Pipeline(sys.argv[1], device="cpu")(labels=[1], steps=2)[0].size)
for argument in sys.argv[2:]:
    print(diffmoe.Pipeline(argument, device="cpu")(labels=[1], steps=2)[0].size)
"""


def test_inference_needs_nothing_of_training(folder: Path, single_run: Config):
    arguments = [sys.executable, "-c", BARE, str(folder), single_run.output]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    rooms, *sizes = done.stdout.splitlines()
    assert rooms.split() == [
        "config",
        "conversion",
        "errors",
        "files",
        "models",
        "parallel",
        "seeding",
    ]
    assert sizes == ["(8, 8)", "(8, 8)"]


def test_the_command_converts_and_the_result_makes_images(single_run: Config, tmp_path: Path):
    tool = "tools/convert_checkpoint.py"
    done = command(sys.executable, tool, single_run.output, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "equal the source's bit for bit" in done.stdout
    assert len(diffmoe.Pipeline(tmp_path / "out", device="cpu")(labels=[1], steps=2)) == 1
    again = command(sys.executable, tool, single_run.output, str(tmp_path / "out"))
    assert again.returncode == 2
    assert again.stderr.strip().endswith("exists; choose another name, or remove it first")
