"""Checkpoints know parameters, not ranks."""

import math
from pathlib import Path

import pytest
import torch

from diffmoe.checkpoints.network import load_network
from diffmoe.checkpoints.pieces import IndexReader
from diffmoe.clock import Clock
from diffmoe.config import Config
from tests.helpers.runs import (
    clock,
    newest,
    pack,
    run_config,
    tensors,
    train,
)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, Config]:
    """Six steps on 2 ranks, P = 2, stage 1, with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("two_ranks")
    pack(folder / "data")
    config = run_config(
        folder,
        6,
        training__checkpoint_samples=24,
        moe__token_pool="global",
        parallel__expert_parallel=2,
        # Far above the gradients' rounding, which Adam would blow up to whole steps.
        optimizer__eps=1e-3,
    )
    train(config, world=2)
    return folder, config


def test_pieces_of_all_ranks_tile_every_tensor(two_ranks):
    path = newest(two_ranks[1])
    stored = IndexReader(path).read_metadata().state_dict_metadata
    network = load_network(path).network
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    for kind in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        for name, size in sizes.items():
            end = 0
            chunks = stored[f"{kind}/{name}"].chunks
            for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[0]):
                assert chunk.offsets[0] == end, (kind, name)
                end += chunk.sizes[0]
            assert end == size, (kind, name)
    layers = [f"buffers/blocks.{b}.feed_forward.capacity_predictor.thresholds" for b in (1, 3)]
    assert set(stored) == {
        f"{kind}/{name}" for kind in ("weights", "exp_avg", "exp_avg_sq", "ema") for name in sizes
    } | set(layers)
    assert stored["weights/blocks.1.feed_forward.experts.w_in"].size == torch.Size([4 * 16 * 64])


def test_load_network_gives_the_checkpoints_weights_whole(two_ranks):
    path = newest(two_ranks[1])
    state = tensors(path)
    live, ema = (load_network(path, weights) for weights in ("live", "ema"))
    for snapshot, kind in ((live, "weights"), (ema, "ema")):
        assert snapshot.clock == Clock(samples=48, step=6, skipped=0)
        assert snapshot.config == two_ranks[1]
        assert snapshot.latents.shape == (2, 8, 8)
        assert not snapshot.network.training
        for name, parameter in snapshot.network.named_parameters():
            assert torch.equal(parameter.flatten(), state[f"{kind}/{name}"]), name
        thresholds = snapshot.network.moe_layers[1].capacity_predictor.thresholds
        assert torch.equal(
            thresholds, state["buffers/blocks.3.feed_forward.capacity_predictor.thresholds"]
        )
        assert (thresholds > 0).all()
    assert not torch.equal(live.network.final.weight, ema.network.final.weight)


def test_a_run_whose_only_step_was_skipped_can_be_resumed(tmp_path: Path):
    """Saved before AdamW ever made its state."""
    pack(tmp_path / "data")
    config = run_config(tmp_path, 1)
    train(config, prepare=break_every_loss)
    assert clock(newest(config)) == {"samples": 8, "step": 1, "skipped": 1}
    assert train(config.replace({"training.total_samples": 16})) == [True]
    assert clock(newest(config)) == {"samples": 16, "step": 2, "skipped": 1}
    moments = tensors(newest(config))["exp_avg/final.weight"]
    assert moments.isfinite().all()
    assert moments.abs().max() > 0


def break_every_loss(rank: int) -> None:
    from diffmoe.diffusion.flow import FlowMatching

    loss = FlowMatching.loss
    FlowMatching.loss = lambda *values: {k: v * math.nan for k, v in loss(*values).items()}


def test_a_save_leaves_nothing_temporary_and_moves_latest(two_ranks):
    folder = Path(two_ranks[1].output)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "latest",
        "metrics.jsonl",
        "step-00000003",
        "step-00000006",
    ]
    assert (folder / "latest").read_text() == "step-00000006"
