"""A run on latents that are no squares, from its data to samples of the exported model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.export.sources import checkpoint_source
from diffmoe.export.writing import write_exported
from diffmoe.pipeline import Pipeline
from diffmoe.routing_report.analysis import sampling_routing
from diffmoe.routing_report.figures import compute_map, picture
from diffmoe.sampling.sampler import Sampler
from tests.helpers.runs import assert_identical, metrics, newest, pack, run_config, tensors, train

WIDE = {"model__input_size": [4, 12], "model__in_channels": 3, "moe__token_pool": "global"}


def test_a_rectangle_goes_all_the_way(tmp_path: Path):
    """Two ranks that share the experts, a stop and a resume, the exported model, its images."""
    pack(tmp_path / "data", shape=(3, 4, 12))
    whole = run_config(tmp_path, 4, **WIDE)
    train(whole)
    halves = {**WIDE, "output": str(tmp_path / "halves"), "parallel__expert_parallel": 2}
    first = run_config(tmp_path, 2, **halves)
    train(first, world=2)
    train(first.replace({"training.total_samples": 32}), world=2)
    losses = [[line["loss"] for line in metrics(one)] for one in (whole, first)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (Path(first.output) / "config.yaml").read_text().count("- 4\n  - 12\n") == 1

    with checkpoint_source(newest(first), "ema") as source:
        write_exported(source, tmp_path / "exported")
    sampler = Sampler.open(str(tmp_path / "exported"), device=torch.device("cpu"))
    settings = sampler.fitted(SamplingSettings(steps=2, guidance=2, seed=3))
    ours = Pipeline(tmp_path / "exported", device="cpu")([1, 3], seed=3, steps=2, guidance=2)
    assert [image.size for image in ours] == [(12, 4)] * 2  # Pillow's width and height
    of_the_run = sampler.images([1, 3], settings).images.numpy()
    assert np.array_equal(np.stack([np.asarray(image) for image in ours]), of_the_run)
    routing = sampling_routing(sampler, [1, 3], settings)
    assert routing.compute.shape == (2, 12)
    assert routing.grid == (2, 6)
    assert picture(compute_map(routing, 0)).width > 100


def test_data_of_another_shape_is_refused_with_the_setting(tmp_path: Path):
    pack(tmp_path / "data", shape=(2, 12, 4))
    with pytest.raises(AssertionError, match=r"set 'model.input_size=\[12, 4\]', or set data.path"):
        train(run_config(tmp_path, 1, model__input_size=[4, 12]))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path):
    pack(tmp_path / "data", shape=(2, 4, 12))
    config = run_config(tmp_path, 1, model__input_size=[4, 12])
    train(config)
    before = tensors(newest(config))
    pack(tmp_path / "other", shape=(2, 12, 4))
    turned = {"model.input_size": [12, 4], "data.path": str(tmp_path / "other")}
    with pytest.raises(AssertionError, match=r"model.input_size: \[4, 12\] there, \[12, 4\] now"):
        train(config.replace({**turned, "training.total_samples": 16}))
    assert_identical(tensors(newest(config)), before)
