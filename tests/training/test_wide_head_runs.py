"""Runs with a wide head: on any ranks, over a resume, from and to a model without one."""

from pathlib import Path

import numpy as np
import pytest

from diffmoe.config import Config
from diffmoe.export.exported_model import ExportedModel
from diffmoe.export.sources import checkpoint_source
from diffmoe.export.writing import write_exported
from diffmoe.pipeline import Pipeline
from tests.helpers.ranks import ranks_of
from tests.helpers.runs import assert_identical, metrics, newest, pack, run_config, tensors, train

HEAD = {"width": 20, "depth": 2, "heads": 2}


def run(folder: Path, name: str, steps: int, **changes) -> Config:
    values = {"model__wide_head": HEAD, "moe__token_pool": "global", "output": str(folder / name)}
    return run_config(folder, steps, **{**values, **changes})


def test_on_any_ranks_over_a_resume_and_exported(tmp_path: Path):
    pack(tmp_path / "data")
    shared = {"parallel__expert_parallel": 2, "parallel__zero_stage": 2}
    alone, whole = run(tmp_path, "alone", 3), run(tmp_path, "whole", 3, **shared)
    train(alone)
    train(whole, world=2)
    for key in ("loss", "gradient_norm"):
        told = [[line[key] for line in metrics(one)] for one in (alone, whole)]
        assert told[0] == pytest.approx(told[1], rel=1e-5), key

    parts = run(tmp_path, "parts", 1, **shared)
    train(parts, world=2)
    train(parts.replace({"training.total_samples": 24}), world=2)
    state = tensors(newest(parts))
    assert_identical(state, tensors(newest(whole)))
    head = {name.split("/")[0] for name in state if "/wide_head." in name}
    assert head == {"weights", "exp_avg", "exp_avg_sq", "ema"}
    # What starts with zeros (the last layer, then modulations) lets it learn from the third step.
    assert state["exp_avg/wide_head.blocks.1.attention.qkv.weight"].any()

    with checkpoint_source(newest(whole), "ema") as source:
        write_exported(source, tmp_path / "exported")
    assert ExportedModel(tmp_path / "exported").metadata.model.wide_head == whole.model.wide_head
    card = (tmp_path / "exported/README.md").read_text()
    assert "4 blocks of width 16 and a wide head of 2 of width 20, 2 heads, patch 2" in card
    drawn = [
        np.stack([np.asarray(image) for image in Pipeline(path, device="cpu")([1, 3], steps=2)])
        for path in (Path(whole.output), tmp_path / "exported")
    ]
    assert np.array_equal(*drawn)


def test_from_a_model_without_one_and_back(tmp_path: Path):
    pack(tmp_path / "data")
    plain = run(tmp_path, "plain", 1, model__wide_head=None)
    train(plain)
    given = plain.output
    for name, head, line in (
        ("with", HEAD, "none there, 2 of width 20, 2 heads here: it and the last layer start anew"),
        ("without", None, "2 of width 20, 2 heads there, none here: the last layer starts anew"),
    ):
        config = run(tmp_path, name, 1, model__wide_head=head, training__init=given)
        with ranks_of(config, 1) as ranks:
            assert ranks.wait() == [0], ranks.told()
            assert f"wide head: {line}" in ranks.told()
        given = config.output
    names = tensors(newest(plain)).keys()
    assert tensors(newest(config)).keys() == names
