"""Sampling in bf16: close to fp32, with its decisions in fp32, and never mixed up with it."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffmoe.cli import add_device, add_dtype, open_sampler
from diffmoe.data.autoencoders import PixelAutoencoder
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.evaluation.models import sample_model
from diffmoe.models.dit import DiT
from diffmoe.parallel.device import default_dtype
from diffmoe.sampling.sampler import Sampler
from tests.helpers.models import exported
from tests.helpers.networks import ALL_FAMILIES, examples, network_of
from tests.helpers.samples import images_of
from tests.helpers.tiny import BYTES, random_batch, tiny_config

SETTINGS = SamplingSettings(steps=4, guidance=1.5)
LABELS = [0, 1, 2, 3, 4, 0, 1, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return exported(tmp_path_factory.mktemp("dtype") / "model")


def in_bf16(network: DiT) -> DiT:
    network.compute_in(torch.bfloat16)
    return network


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", "fp32"),
        ("cuda", "bf16"),
        ("cuda:3", "bf16"),
        (torch.device("cuda", 1), "bf16"),
        (torch.device("cpu"), "fp32"),
        ("mps", "fp32"),
    ],
    ids=str,
)
def test_the_default_follows_the_device(device, expected: str):
    assert default_dtype(device) == expected


def test_images_are_close_to_those_of_fp32(model: Path, device: torch.device):
    fp32, bf16 = (Sampler.open(model, device=device, dtype=dtype) for dtype in ("fp32", "bf16"))
    expected, found = (one.images(LABELS, SETTINGS).images.float() for one in (fp32, bf16))
    difference = (found - expected).abs()
    assert 0 < difference.mean() < 1  # of 255 levels; 0.3 was seen
    assert expected.std() > 10
    latents = bf16.latents(LABELS, SETTINGS)
    assert latents.dtype == torch.float32
    assert (fp32.dtype, bf16.dtype) == ("fp32", "bf16")
    assert Sampler.open(model, dtype=torch.bfloat16).dtype == "bf16"
    assert Sampler.open(model, dtype="float16").dtype == "float16"


VARIANTS = {
    **{family: {"moe__type": family} for family in ALL_FAMILIES},
    "dense": {"moe__type": "dense"},
    "swiglu": {"moe__activation": "swiglu", "moe__shared_expert_ratio": 2.0},
    "rope": {"model__rope": True, "model__qk_norm": True},
    "text": {"model__text": BYTES},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_that_are_kept_in_bf16_change_no_bit_of_autocast(variant: str):
    config = tiny_config(**VARIANTS[variant])
    batch = random_batch(config, 0, range(config.data.lanes))
    times = torch.linspace(0.1, 0.9, len(batch.labels))
    inputs = batch.latents, times, batch.text or batch.labels
    network = network_of(config)
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            expected = network(*inputs)
        fp32 = network(*inputs)
        found = in_bf16(network)(*inputs)
    assert torch.equal(found.prediction, expected.prediction)
    assert not torch.equal(found.prediction, fp32.prediction)
    for ours, theirs in zip(found.routing, expected.routing, strict=True):
        assert torch.equal(ours.selected_ES, theirs.selected_ES)
    kept = {name: parameter.dtype for name, parameter in network.routing_parameters().items()}
    assert set(kept.values()) == ({torch.float32} if network.moe_layers else set())
    norms = [module for module in network.modules() if isinstance(module, nn.RMSNorm)]
    assert {norm.weight.dtype for norm in norms} <= {torch.float32}
    shares = [parameter.dtype == torch.bfloat16 for parameter in network.blocks.parameters()]
    assert sum(shares) > len(shares) / 2


def chosen(network: DiT, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.stack([layer.selected_ES for layer in network(*inputs).routing])


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_nearly_all_tokens_are_routed_as_in_fp32(family: str, device: torch.device):
    network = network_of(tiny_config(moe__type=family)).to(device)
    inputs = tuple(tensor.to(device) for tensor in examples(32))
    expected_LES = chosen(network, inputs)
    found_LES = chosen(in_bf16(network), inputs)
    same = (found_LES == expected_LES).float().mean((1, 2))
    assert 0.2 < expected_LES.float().mean() < 0.8  # both decisions are there
    # Scores near a threshold, or near another's, fall to either side: products keep 8 bits.
    assert same.min() > 0.985  # 0.994 was the least seen


class Watched(PixelAutoencoder):
    """Notes what it is given."""

    def decode(self, latents: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        assert latents.dtype == torch.float32
        self.decoded = len(latents)
        return super().decode(latents)


def test_the_forward_alone_is_in_bf16(model: Path):
    sampler = replace(Sampler.open(model, dtype="bf16"), autoencoder=Watched())
    states: list[bool] = []

    def observe(forward) -> None:
        states.append(torch.is_autocast_enabled("cpu"))

    sampler.images(LABELS, SETTINGS, watch=lambda size: observe)
    assert sampler.autoencoder.decoded == len(LABELS)
    assert states == [False] * 8  # of four guided steps


def fill(model: Path, out: Path, dtype: str) -> dict:
    sampler = Sampler.open(model, dtype=dtype)
    return sampler.folder(out, sampler.request(6), SETTINGS, batch=3, shard_size=3).manifest


def test_a_folder_is_not_gone_on_with_in_another_type(model: Path, tmp_path: Path):
    folders = {dtype: tmp_path / dtype for dtype in ("fp32", "bf16")}
    for dtype, folder in folders.items():
        assert fill(model, folder, dtype)["dtype"] == dtype
        assert json.loads((folder / "samples.json").read_text())["dtype"] == dtype
    assert (images_of(folders["fp32"]) != images_of(folders["bf16"])).any()
    with pytest.raises(UserError, match=r"other settings .*\(dtype: bf16 there, fp32 now\)"):
        fill(model, folders["bf16"], "fp32")
    with pytest.raises(UserError, match=r"\(dtype: fp32 there, bf16 now\); use the same"):
        fill(model, folders["fp32"], "bf16")


def test_a_folder_of_before_is_of_fp32(model: Path, tmp_path: Path):
    fill(model, tmp_path, "fp32")
    expected = images_of(tmp_path).copy()
    for file in (tmp_path / "samples.json", tmp_path / ".sampling/plan.json"):
        values = json.loads(file.read_text())
        del values["dtype"]
        file.write_text(json.dumps(values))
    (tmp_path / "samples-000001.npz").unlink()
    with pytest.raises(UserError, match=r"\(dtype: fp32 there, bf16 now\)"):
        fill(model, tmp_path, "bf16")
    fill(model, tmp_path, "fp32")
    assert (images_of(tmp_path) == expected).all()


def test_an_evaluation_in_bf16_has_a_folder_of_its_own(model: Path, tmp_path: Path):
    names = []
    for dtype in ("fp32", "bf16"):
        sampler = Sampler.open(model, dtype=dtype)
        names.append(sample_model(sampler, tmp_path, sampler.request(5), SETTINGS).folder.name)
    assert len(set(names)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("words", [[], ["--dtype", "bf16"], ["--dtype", "fp32"]])
def test_the_flag_opens_the_model_in_its_type(model: Path, words: list[str], device: torch.device):
    parser = argparse.ArgumentParser()
    add_device(parser)
    add_dtype(parser)
    options = parser.parse_args([*words, "--device", str(device)])
    options.run = model
    expected = words[-1] if words else {"cpu": "fp32", "cuda": "bf16"}[device.type]
    assert open_sampler(options, device, with_prompts=False).dtype == expected
