"""Three lines of code that make images, in an environment without anything of training."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffmoe
from diffmoe.capacity.thresholds import Calibrated, store
from diffmoe.config import Config
from diffmoe.data.autoencoders import PixelAutoencoder
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.export.open import open_network
from tests.helpers.models import NAMES, exported
from tests.helpers.processes import environment
from tests.helpers.runs import newest
from tests.helpers.sampling import latents_of
from tests.helpers.tools import forked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("pipeline") / "out", class_names=NAMES)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> diffmoe.Pipeline:
    return diffmoe.Pipeline(folder, device="cpu")


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_a_pipeline_gives_the_images_that_sampling_gives(folder: Path):
    pipeline = diffmoe.Pipeline(folder, device="cpu")
    images = pipeline(labels=[3, 0, 3], seed=5, steps=4, guidance=2)
    assert [(image.mode, image.size) for image in images] == [("RGB", (8, 8))] * 3
    snapshot = open_network(folder)
    latents = latents_of(
        snapshot.network, snapshot.config, [3, 0, 3], range(3),
        SamplingSettings(steps=4, guidance=2, seed=5),
    )  # fmt: skip
    assert np.array_equal(pixels(images), PixelAutoencoder().decode(latents).numpy())
    assert len(np.unique(pixels(images))) > 50


def test_names_of_classes_are_as_good_as_numbers(folder: Path):
    pipeline = diffmoe.Pipeline(folder, device="cpu")
    by_name = pipeline(labels=["cat", "plane"], steps=2)
    assert np.array_equal(pixels(by_name), pixels(pipeline(labels=[3, 0], steps=2)))
    assert np.array_equal(pixels(pipeline("cat", steps=2)), pixels(by_name)[:1])
    with pytest.raises(UserError, match="class 'dog' is unknown"):
        pipeline(labels=["dog"])
    with pytest.raises(UserError, match=r"class 5 is outside 0\.\.4"):
        pipeline(labels=[5])


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([2.7], "label 2.7 is neither the number nor the name of a class"),
        ([True], "label True is neither"),
        ([None], "label None is neither"),
        (torch.tensor([1.0]), "is neither"),
        ([-1], "-1"),
        ([], "labels=\\[\\] asks for no image"),
        (3, "labels=3: give a list"),
        ("boat", "class 'boat' is unknown"),
        (torch.tensor([[1, 2]]), "give a list"),
    ],
)
def test_what_is_no_label_is_told_so(pipeline: diffmoe.Pipeline, labels: Any, told: str):
    with pytest.raises(UserError, match=told):
        pipeline(labels=labels, steps=1)


def test_labels_may_be_a_tensor_or_an_array(pipeline: diffmoe.Pipeline):
    expected = pixels(pipeline(labels=[3, 0], steps=1))
    for labels in (torch.tensor([3, 0]), np.array([3, 0]), range(3, -1, -3)):
        assert np.array_equal(pixels(pipeline(labels=labels, steps=1)), expected)


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


def test_other_settings_than_a_calibration_s_are_told_with_the_capacity_met(tmp_path: Path):
    model, settings = exported(tmp_path / "model"), SamplingSettings(steps=2, guidance=1.5)
    entry = Calibrated(
        weights="ema", capacity=0.8, measured=0.8, common=False, over="trajectory", samples=1,
        sampling=settings, log_odds=[[0.0] * 4] * 2,
    )  # fmt: skip
    store(model, "0.8", entry)
    pipeline = diffmoe.Pipeline(model, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline(labels=[1], steps=2, capacity=0.8)
    with pytest.warns(UserWarning, match=r"guidance 1\.5; with guidance 3.0 met capacity \d\.\d+"):
        pipeline(labels=[1], steps=2, capacity=0.8, guidance=3.0)


def test_a_model_trained_without_label_dropout_is_not_guided(tmp_path: Path):
    model = exported(tmp_path / "model", label_dropout=0.0)
    pipeline = diffmoe.Pipeline(model, device="cpu")
    with pytest.warns(UserWarning, match="guidance 1: the model was trained without label dropout"):
        images = pipeline(labels=[1, 2], steps=2)
    assert np.array_equal(pixels(images), pixels(pipeline(labels=[1, 2], steps=2, guidance=1)))
    with pytest.raises(UserError, match=r"guidance 1\.5: .* use guidance 1$"):
        pipeline(labels=[1], steps=2, guidance=1.5)
    assert "guidance=1)" in (model / "README.md").read_text()
    usual = diffmoe.Pipeline(exported(tmp_path / "silent"), device="cpu")  # an export of before
    guided = pixels(usual(labels=[1, 2], steps=2))
    assert np.array_equal(guided, pixels(usual(labels=[1, 2], steps=2, guidance=1.5)))
    assert not np.array_equal(guided, pixels(images))


def test_a_run_is_as_good_as_an_export(single_run: Config):
    pipeline = diffmoe.Pipeline(single_run.output, device="cpu", weights="live")
    assert pipeline.folder == newest(single_run)
    assert len(pipeline(labels=["deer"], steps=2)) == 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_a_pipeline_saves_is_what_was_opened(dtype: str, single_run: Config, tmp_path: Path):
    pipeline = diffmoe.Pipeline(single_run.output, device="cpu", weights="live", dtype=dtype)
    saved = pipeline.save_pretrained(tmp_path / "saved")
    assert saved == tmp_path / "saved"
    there, again = open_network(single_run.output, "live"), open_network(saved)
    assert again.config.model == there.config.model
    assert again.latents == there.latents
    for name, tensor in again.network.state_dict().items():
        assert torch.equal(tensor, there.network.state_dict()[name]), name
    with pytest.raises(UserError, match="saved exists; choose another name"):
        pipeline.save_pretrained(tmp_path / "saved")


def test_an_exported_model_is_saved_with_its_thresholds_in_another_type(tmp_path: Path):
    model = exported(tmp_path / "model", class_names=NAMES)
    entry = Calibrated(
        weights="ema", capacity=0.8, measured=0.0, common=False, over="noise", samples=1,
        log_odds=[[0.0] * 4] * 2,
    )  # fmt: skip
    store(model, "0.8", entry)
    saved = diffmoe.Pipeline(model, device="cpu").save_pretrained(tmp_path / "saved", "bfloat16")
    again = diffmoe.Pipeline(saved, device="cpu")
    assert again.class_names == tuple(NAMES)
    with pytest.warns(UserWarning, match="the thresholds of capacity 0.8 were calibrated"):
        again(labels=["cat"], steps=1, capacity=0.8)
    for name, tensor in diffmoe.load(model, device="cpu").named_parameters():
        assert torch.equal(again.network.get_parameter(name), tensor.bfloat16().float()), name


def test_a_network_that_was_changed_is_neither_saved_nor_pushed(folder: Path, tmp_path: Path):
    pipeline = diffmoe.Pipeline(folder, device="cpu")
    with torch.no_grad():
        pipeline.network.final.bias += 1
    for saved in (
        lambda: pipeline.save_pretrained(tmp_path / "saved"),
        lambda: pipeline.push_to_hub("somebody/new", license="mit"),
    ):
        with pytest.raises(UserError, match=r"final\.bias was changed since .* was opened"):
            saved()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="somebody/new: the model has no license yet"):
        pipeline.push_to_hub("somebody/new", dtype="bfloat16")


@pytest.mark.parametrize("dtype", [torch.float16, "float16", "torch.float64"])
def test_load_and_pipeline_take_the_same_types(dtype, folder: Path):
    network = diffmoe.load(folder, device="cpu", dtype=dtype)
    pipeline = diffmoe.Pipeline(folder, device="cpu", dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    for one in (network, pipeline.network):
        assert {parameter.dtype for parameter in one.parameters()} == {wanted}
        assert one.positions.dtype == one.thresholds_LE.dtype == torch.float32
    fp32 = diffmoe.Pipeline(folder, device="cpu")(labels=[1, 2], steps=4)
    images = pipeline(labels=[1, 2], steps=4)
    assert np.abs(pixels(fp32).astype(int) - pixels(images)).mean() < 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "bf16"])
def test_bf16_is_of_the_network_s_products(dtype, folder: Path):
    loaded = diffmoe.load(folder, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    pipeline = diffmoe.Pipeline(folder, device="cpu", dtype=dtype)
    for layer in pipeline.network.moe_layers:
        assert layer.router.dtype == layer.tracked.dtype == torch.float32
        assert layer.experts.w_out.dtype == torch.bfloat16
    fp32, usual, bf16 = (
        pixels(one(labels=[1, 2], steps=4)).astype(int)
        for one in (
            diffmoe.Pipeline(folder, device="cpu", dtype="fp32"),
            diffmoe.Pipeline(folder, device="cpu"),
            pipeline,
        )
    )
    assert np.array_equal(usual, fp32)
    assert 0 < np.abs(fp32 - bf16).mean() < 5


@pytest.mark.parametrize("dtype", ["float8", torch.int32, torch.float8_e5m2, "fp8"])
def test_load_and_pipeline_refuse_the_same_types(dtype, folder: Path, single_run: Config):
    told = f"dtype {dtype}: choose float32, bfloat16, float16 or float64".replace("torch.", "")
    for path in (folder, single_run.output):
        for opened in (diffmoe.load, diffmoe.Pipeline):
            with pytest.raises(UserError, match=told):
                opened(path, device="cpu", dtype=dtype)


def test_what_is_neither_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        diffmoe.load(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = diffmoe.Pipelin


def test_the_public_names_are_listed_and_there():
    assert set(diffmoe.__all__) <= set(dir(diffmoe))
    assert {diffmoe.__all__[k] for k in range(5)} == {
        "Pipeline", "UserError", "load", "load_config", "train"
    }  # fmt: skip
    assert diffmoe.UserError is UserError
    assert diffmoe.load_config("mnist").model.num_classes == 10


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


@pytest.mark.slow
def test_inference_needs_nothing_of_training(folder: Path, single_run: Config):
    arguments = [sys.executable, "-c", BARE, str(folder), single_run.output]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    rooms, *sizes = done.stdout.splitlines()
    allowed = "clock conditions config errors export files hash_cache models parallel"
    allowed += " redaction seeding latent_spec"
    assert set(rooms.split()) <= set(allowed.split())
    assert sizes == ["(8, 8)", "(8, 8)"]


@pytest.mark.slow
def test_the_command_converts_and_the_result_makes_images(single_run: Config, tmp_path: Path):
    tool = "tools/convert_checkpoint.py"
    done = forked(tool, single_run.output, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "equal the source's bit for bit" in done.stdout
    assert len(diffmoe.Pipeline(tmp_path / "out", device="cpu")(labels=[1], steps=2)) == 1
    again = forked(tool, single_run.output, tmp_path / "out")
    assert again.returncode == 2
    assert again.stderr.strip().endswith("exists; choose another name, or remove it first")
