"""Aligned runs: on any ranks, over a stop and a resume, until a clock, and what is left of them."""

from pathlib import Path

import pytest
import torch

from diffmoe.config import Config
from diffmoe.data.examples import micro_batches
from diffmoe.diffusion import create_objective
from diffmoe.export.exported_model import ExportedModel
from diffmoe.export.sources import checkpoint_source
from diffmoe.export.writing import write_exported
from diffmoe.models.alignment import alignment_loss, alignment_targets
from diffmoe.models.dit import DiT
from diffmoe.pipeline import Pipeline
from diffmoe.training.step import losses_of
from tests.helpers.runs import assert_identical, metrics, newest, pack, run_config, tensors, train
from tests.helpers.tiny import random_batch, randomize, tiny_config

CONTENT = {"encoder": "random", "layer": "last", "checksum": None, "shape": (6, 3, 3)}
ALIGN = {"block": 2, "width": 6, "hidden": 10, "weight": 2.0}
SHARED = {"parallel__expert_parallel": 2, "parallel__zero_stage": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pack(tmp_path / "data", features=CONTENT)
    return tmp_path


def run(folder: Path, name: str, steps: int, **changes) -> Config:
    values = {"align": ALIGN, "moe__token_pool": "global", "output": str(folder / name)}
    return run_config(folder, steps, **{**values, **changes})


def test_an_aligned_run_on_any_ranks_and_over_a_resume(folder: Path):
    """Two ranks share the experts; what is exported and averaged knows of no projector."""
    alone, whole = run(folder, "alone", 4), run(folder, "whole", 4, **SHARED)
    train(alone)
    train(whole, world=2)
    for key in ("loss", "alignment_loss", "gradient_norm"):
        told = [[line[key] for line in metrics(one)] for one in (alone, whole)]
        assert told[0] == pytest.approx(told[1], rel=1e-5), key
    assert all(-1 < line["alignment_loss"] < 1 for line in metrics(alone))

    halves = run(folder, "halves", 2, **SHARED)
    train(halves, world=2)
    train(halves.replace({"training.total_samples": 32}), world=2)
    state = tensors(newest(halves))
    assert_identical(state, tensors(newest(whole)))
    kinds = {name.split("/")[0] for name in state if "/projector." in name}
    assert kinds == {"weights", "exp_avg", "exp_avg_sq"}
    assert state["exp_avg/projector.layers.0.weight"].abs().max() > 0

    with checkpoint_source(newest(whole), "ema") as source:
        write_exported(source, folder / "exported")
    names = ExportedModel(folder / "exported").shapes.keys()
    assert f"ema/{min(names)}" in state
    assert not [name for name in names if "projector" in name]
    assert Pipeline(folder / "exported", device="cpu")([1], steps=2)[0].size == (8, 8)


def test_off_is_the_run_of_before_and_on_is_another(folder: Path):
    pack(folder / "plain")
    unaware = run(folder, "unaware", 2, align={}, data__path=str(folder / "plain"))
    off, on = run(folder, "off", 2, align={}), run(folder, "on", 2)
    for config in (unaware, off, on):
        train(config)
    expected = tensors(newest(unaware))
    assert_identical(tensors(newest(off)), expected)
    assert "alignment_loss" not in metrics(off)[0]
    # The same examples: the first loss is of the same weights.
    assert metrics(on)[0]["loss"] == metrics(off)[0]["loss"]
    aligned = tensors(newest(on))
    assert not torch.equal(
        aligned["weights/blocks.1.attention.qkv.weight"],
        expected["weights/blocks.1.attention.qkv.weight"],
    )


def test_a_run_begins_from_a_model_with_or_without_alignment(folder: Path):
    plain = run(folder, "plain", 1, align={})
    train(plain)
    aligned = run(folder, "aligned", 1, training__init=plain.output)
    train(aligned)
    assert -1 < metrics(aligned)[0]["alignment_loss"] < 1
    back, again = (
        run(folder, name, 1, align={}, training__init=model)
        for name, model in (("back", aligned.output), ("again", plain.output))
    )
    for config in (back, again):
        train(config)
    names = tensors(newest(back)).keys()
    assert names == tensors(newest(again)).keys() == tensors(newest(plain)).keys()


@pytest.mark.parametrize("stage", [1, 2])
def test_alignment_ends_at_a_clock(folder: Path, stage: int):
    """From there on features are not even read, and blocks learn from the objective alone."""
    whole = run(folder, "whole", 2, **{**SHARED, "parallel__zero_stage": stage})
    ended = run(
        folder, "ended", 4, **{**SHARED, "parallel__zero_stage": stage},
        align={**ALIGN, "until_samples": 16}, training__checkpoint_samples=16,
    )  # fmt: skip
    train(whole, world=2)
    train(ended, world=2)
    at_the_end = Path(ended.output) / "step-00000002"
    assert_identical(tensors(at_the_end), tensors(newest(whole)))
    lines = metrics(ended)
    assert ["alignment_loss" in line for line in lines] == [True, True, False, False]
    assert all(line["skipped_steps"] == 0 for line in lines)
    # The gradients of the projector are zero: its moments only fade.
    before, after = tensors(at_the_end), tensors(newest(ended))
    faded = after["exp_avg/projector.layers.4.weight"]
    expected = before["exp_avg/projector.layers.4.weight"] * 0.9**2
    torch.testing.assert_close(faded, expected, rtol=1e-5, atol=1e-9)
    moved = "weights/blocks.0.attention.qkv.weight"
    assert not torch.equal(before[moved], after[moved])


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_the_step_adds_the_weighted_loss_to_the_others(kind: str):
    config = tiny_config(align={**ALIGN, "projector": kind})
    network = randomize(DiT(config.model, config.moe, align=config.align)).train()
    lanes, objective = range(config.data.lanes), create_objective(config)
    batch = random_batch(config, 0, lanes)
    (one,) = micro_batches(batch, config, lanes, 0, objective)
    loss, parts, _ = losses_of(network, objective, one, config)
    targets = alignment_targets(batch.features, config.model.grid, spatial=kind == "conv")
    assert torch.equal(parts["alignment_loss"], alignment_loss(network(*one.inputs)[2], targets))
    total = parts["loss"] + parts["routing_loss"] + 2 * parts["alignment_loss"]
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=0)
    assert abs(parts["alignment_loss"].item()) > 1e-3


@pytest.mark.parametrize(
    ("features", "align", "told"),
    [
        (None, ALIGN, "there are no features, but align.block=2 aligns with them; add them"),
        (CONTENT, {**ALIGN, "width": 7}, "have 6 channels, but align.width=7; set align.width=6"),
    ],
)
def test_data_that_cannot_align_is_refused(tmp_path: Path, features, align: dict, told: str):
    pack(tmp_path / "data", **({} if features is None else {"features": features}))
    with pytest.raises(AssertionError, match=told):
        train(run(tmp_path, "run", 1, align=align))


def test_another_projector_is_another_run(folder: Path):
    config = run(folder, "run", 1)
    train(config)
    with pytest.raises(AssertionError, match="projector: mlp there, conv now"):
        train(config.replace({"align.projector": "conv", "training.total_samples": 16}))
