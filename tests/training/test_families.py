"""Runs of the newer families: their state is resumed exactly, and part of what is given away."""

from pathlib import Path

import pytest
import torch

import diffmoe
from diffmoe.checkpoints.network import load_network
from diffmoe.export.exported_model import ExportedModel
from diffmoe.export.sources import checkpoint_source
from diffmoe.export.writing import probe, write_exported
from tests.helpers.runs import (
    SignalDuringStep,
    assert_identical,
    metrics,
    newest,
    pack,
    run_config,
    tensors,
    train,
)

pytestmark = pytest.mark.slow

FAMILIES = {
    "race": {"moe__similarity_loss_weight": 0.1, "moe__target_loss_weight": 0.1},
    "promoe": {"training__label_dropout": 0.5, "moe__shared_expert_ratio": 1.0},
    "dsmoe": {"moe__top_k": 2, "moe__shared_expert_ratio": 1.0, "moe__z_loss_weight": 0.1},
}
STATE = {"race": ["thresholds"], "promoe": [], "dsmoe": ["selection_bias"]}
LOSSES = {
    "race": ["similarity_loss", "target_loss"],
    "promoe": ["contrastive_loss"],
    "dsmoe": ["z_loss"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_stopped_resumed_and_exported(tmp_path: Path, family: str):
    pack(tmp_path / "data")
    changes = {"moe__type": family, "parallel__expert_parallel": 2, **FAMILIES[family]}
    whole = run_config(tmp_path, 4, **changes)
    parts = whole.replace({"output": str(tmp_path / "parts")})
    assert train(whole, 2) == [True] * 2
    assert train(parts, 2, prepare=SignalDuringStep(2)) == [False] * 2
    assert train(parts, 2) == [True] * 2
    state = tensors(newest(whole))
    assert_identical(tensors(newest(parts)), state)
    buffers = {name: tensor for name, tensor in state.items() if name.startswith("buffers/")}
    assert {name.split(".")[-1] for name in buffers} == set(STATE[family])
    assert all(tensor.count_nonzero() > 0 for tensor in buffers.values())
    for line in metrics(whole):
        assert {*LOSSES[family], "expert_load"} <= line.keys()

    with checkpoint_source(newest(whole), "ema") as source:
        write_exported(source, tmp_path / "exported")
    metadata = ExportedModel(tmp_path / "exported").metadata
    found = probe(diffmoe.load(tmp_path / "exported", device="cpu"), metadata)
    expected = probe(load_network(newest(whole)).network, metadata)
    assert found.keys() == ({"per_token", "static"} if family == "race" else {"per_token"})
    for how, output in found.items():
        assert torch.equal(output, expected[how])
