"""The held-out loss of live runs: any number of ranks, no trace in the run, exact on resuming."""

import json
from pathlib import Path

import pytest
import torch

from diffmoe.checkpoints.network import load_network
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.evaluation import held_out
from diffmoe.evaluation.held_out import HeldOut, training_routing
from diffmoe.training import preflight
from tests.helpers.runs import assert_identical, metrics, newest, pack, run_config, tensors, train

STEPS, SAMPLES = 4, 22  # three batches: two ranks repeat the last one
KEYS = (
    "validation_loss",
    "validation_loss_training_routing",
    "validation_loss_live",
    "validation_loss_live_training_routing",
)


def small_batches(rank: int) -> None:
    """For ranks: several batches each, of which the last are repeated."""
    from diffmoe.training import validation

    held_out.BATCH = validation.BATCH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    pack(folder / "data")
    pack(folder / "held-out", [9, 11, 14], first=100)
    return folder


def config_of(folder: Path, name: str, **changes) -> Config:
    values = {
        "output": str(folder / name),
        "moe__token_pool": "global",
        "training__validate_every": 16,
        "training__checkpoint_samples": 16,
        "validation__path": str(folder / "held-out"),
        "validation__samples": SAMPLES,
        "optimizer__eps": 1e-3,
    }
    return run_config(folder, STEPS, **{**values, **changes})


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> Config:
    config = config_of(folder, "one")
    train(config, prepare=small_batches)
    return config


def test_lines_of_metrics_hold_it_when_it_is_due(one_rank: Config):
    lines = metrics(one_rank)
    assert [line["samples"] for line in lines] == [8, 16, 24, 32]
    assert [("validation_loss" in line) for line in lines] == [False, True, False, True]
    for line in lines[1::2]:
        assert len({line[key] for key in KEYS}) == 4  # four ways, four numbers
        assert len(line["validation_by_time"]) == 10
        mean = sum(line["validation_by_time"]) / 10
        assert mean == pytest.approx(line["validation_loss"], rel=0.1)  # of 2 or 3 samples each


def test_it_is_what_the_stored_checkpoint_gives(one_rank: Config, monkeypatch):
    monkeypatch.setattr(held_out, "BATCH", 8)
    last = metrics(one_rank)[-1]
    for weights, suffix in (("ema", ""), ("live", "_live")):
        network = load_network(newest(one_rank), weights).network.eval()
        of = HeldOut(one_rank, one_rank.validation.path, SAMPLES)
        found = of.summary(of.measure(network)).loss
        assert found == pytest.approx(last[f"validation_loss{suffix}"], rel=1e-6)
        with network.routed(training_routing(network)):
            found = of.summary(of.measure(network)).loss
        assert found == pytest.approx(last[f"validation_loss{suffix}_training_routing"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "ranks"), [(2, 1), (2, 2), (4, 2)])
def test_any_ranks_give_the_same_losses(folder: Path, one_rank: Config, world: int, ranks: int):
    config = config_of(folder, f"{world}-{ranks}", parallel__expert_parallel=ranks)
    train(config, world, prepare=small_batches)
    for ours, theirs in zip(metrics(config)[1::2], metrics(one_rank)[1::2], strict=True):
        for key in (*KEYS, "validation_by_time", "validation_capacity"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-6), key


@pytest.mark.slow
def test_the_run_is_bit_for_bit_the_same_without(folder: Path, one_rank: Config):
    config = config_of(folder, "without", training__validate_every=None)
    train(config)
    assert_identical(tensors(newest(config)), tensors(newest(one_rank)))
    assert [line["loss"] for line in metrics(config)] == [
        line["loss"] for line in metrics(one_rank)
    ]


@pytest.mark.slow
def test_a_resumed_run_measures_the_same(folder: Path, one_rank: Config):
    config = config_of(folder, "resumed", training__total_samples=16)
    train(config, prepare=small_batches)
    longer = config.replace({"training.total_samples": 8 * STEPS})
    train(longer, prepare=small_batches)
    assert [line.get("validation_loss") for line in metrics(longer)] == [
        line.get("validation_loss") for line in metrics(one_rank)
    ]


def test_what_is_trained_on_is_refused(folder: Path):
    config = config_of(folder, "refused", validation__path=str(folder / "data"))
    with pytest.raises(UserError, match=r"its shard 000000\.tar is one of data\.path=.*trained on"):
        preflight.check(config, {}, 1)


def test_refusals_come_before_work(folder: Path):
    config = config_of(folder, "refused", validation__samples=35)
    with pytest.raises(UserError, match=r"validation\.samples=35: .* holds 34"):
        preflight.check(config, {}, 1)
    with pytest.raises(
        UserError, match=r"held-out-none does not exist.* set validation\.path to a folder"
    ):
        preflight.check(config_of(folder, "x", validation__path="held-out-none"), {}, 1)
    with pytest.raises(UserError, match=r"validate_every=16 needs validation\.path"):
        config_of(folder, "x", validation__path=None)


def test_numbers_are_finite_json(one_rank: Config):
    text = (Path(one_rank.output) / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert all(torch.tensor(json.loads(line)["loss"]).isfinite() for line in text.splitlines())
