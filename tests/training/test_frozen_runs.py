"""Runs of which some parameters stay as they are: what they save, and what they go on with."""

from pathlib import Path

import pytest
import torch

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.frozen import frozen_names
from diffmoe.planning.layouts import Layout
from diffmoe.planning.submission import checkpoint_bytes
from diffmoe.training import preflight
from diffmoe.training.resume import find_checkpoint
from tests.helpers.devices import GPU
from tests.helpers.runs import (
    HALF,
    assert_identical,
    half_of,
    newest,
    pack,
    run_config,
    tensors,
    train,
)
from tests.helpers.tiny import refusal, tiny_config

PATTERNS = ("blocks.1.*", "*.experts.w_out", "patch_embed.*")


def frozen_of(config: Config) -> frozenset[str]:
    return frozen_names(DiT(config.model, config.moe), config.training)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Config:
    """Six steps of two ranks that share the experts, from another run's weights, in bf16."""
    folder = tmp_path_factory.mktemp("frozen")
    pack(folder / "data")
    base = run_config(folder, 2, output=str(folder / "base"))
    assert train(base) == [True]
    config = run_config(
        folder,
        6,
        training__checkpoint_samples=24,
        training__init=base.output,
        training__freeze=PATTERNS,
        training__precision="bf16",
        moe__token_pool="global",
        parallel__expert_parallel=2,
    )
    assert train(config, world=2) == [True, True]
    return config


def test_frozen_weights_are_those_of_before_bit_for_bit_and_have_no_state(run: Config):
    base = run.replace({"output": run.training.init})
    before, state, frozen = tensors(newest(base)), tensors(newest(run)), frozen_of(run)
    assert {"blocks.1.attention.qkv.weight", "blocks.3.feed_forward.experts.w_out"} <= frozen
    names = {name.partition("/")[2] for name in state if name.startswith("weights/")}
    assert frozen < names
    for name in names:
        # training.init takes the averages; in fp32, which bf16 would have rounded.
        stayed = torch.equal(state[f"weights/{name}"], before[f"ema/{name}"])
        assert stayed == (name in frozen), name
        assert (f"exp_avg/{name}" in state) == (name not in frozen)
        assert torch.equal(state[f"ema/{name}"], state[f"weights/{name}"]) == (name in frozen)
    held = sum(4 * one.numel() for name, one in state.items() if not name.startswith("buffers/"))
    assert held == checkpoint_bytes(Layout(run, 1, 2))


def test_resuming_equals_not_stopping_bit_for_bit(run: Config, tmp_path: Path):
    config = half_of(run, tmp_path)
    assert train(config, world=2) == [True, True]
    assert_identical(tensors(newest(config)), tensors(newest(run)))


def test_another_layout_goes_on_alike(run: Config, tmp_path: Path):
    config = half_of(run, tmp_path, parallel__expert_parallel=1, parallel__zero_stage=2)
    assert train(config) == [True]
    found, expected = tensors(newest(config)), tensors(newest(run))
    assert found.keys() == expected.keys()
    for name in frozen_of(run):
        assert torch.equal(found[f"weights/{name}"], expected[f"weights/{name}"]), name


@pytest.mark.parametrize(("optimizer", "stage"), [("adamw", 1), ("adamw", 2), ("muon", 2)])
def test_offloading_the_optimizer_gives_the_same_run(
    run: Config, tmp_path: Path, optimizer: str, stage: int
):
    """From a checkpoint, and on to one; frozen masters stay with the network."""
    ds_config = tmp_path / "ds.json"
    ds_config.write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    found, expected = (
        half_of(run, tmp_path / name, parallel__zero_stage=stage, optimizer__type=optimizer)
        for name in ("offloaded", "plain")
    )
    allowed = ["optimizer.type"]
    train(found, world=2, ds_config=str(ds_config), allow_changed=allowed)
    train(expected, world=2, allow_changed=allowed)
    assert_identical(tensors(newest(found)), tensors(newest(expected)))


@pytest.mark.parametrize("place", [pytest.param("cuda", marks=GPU)])
def test_offloaded_and_frozen_masters_are_on_two_devices(run: Config, tmp_path: Path, place: str):
    ds_config = tmp_path / "ds.json"
    ds_config.write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    config = half_of(run, tmp_path, parallel__expert_parallel=1)
    train(config, ds_config=str(ds_config), device=place)
    state, half = tensors(newest(config)), tensors(Path(config.output) / HALF)
    for name in (name for name in state if name.startswith("weights/")):
        stayed = name.partition("/")[2] in frozen_of(run)
        assert torch.equal(state[name], half[name]) == stayed, name


def test_other_frozen_parameters_are_refused_unless_allowed(run: Config, tmp_path: Path):
    config = half_of(run, tmp_path, training__freeze=(), parallel__expert_parallel=1)
    with pytest.raises(UserError, match=r"training\.freeze: \['blocks\.1\.\*', .* there, \[\] now"):
        find_checkpoint(config, "auto")
    notes = find_checkpoint(config, "auto", ["training.freeze"]).notes
    assert notes[1].endswith("[] now; the optimizer's state starts anew")
    assert train(config, allow_changed=["training.freeze"]) == [True]
    state, half = tensors(newest(config)), tensors(Path(config.output) / HALF)
    for name in frozen_of(run):
        assert f"exp_avg/{name}" in state
        assert not torch.equal(state[f"weights/{name}"], half[f"weights/{name}"]), name


def test_patterns_that_cannot_be_meant_are_refused(tmp_path: Path):
    pack(tmp_path / "data")
    for patterns, message in (
        ({"training__freeze": ("blocks.1.atention.*",)}, "names are such as blocks.1.attention."),
        ({"training__train_only": ("lora.*",)}, "training.train_only: lora.* matches no parameter"),
        ({"training__freeze": ("*",)}, "leaves no parameter to train"),
    ):
        with pytest.raises(UserError) as caught:
            preflight.check(run_config(tmp_path, 1, **patterns), {}, 1)
        assert message in str(caught.value)
    both = refusal("training.freeze=[a]", "training.train_only=[b]")
    assert "say the same in two ways" in both
    only = tiny_config(training__train_only=("final.*",))
    names = {name for name, _ in DiT(only.model, only.moe).named_parameters()}
    assert names - frozen_of(only) == {"final.weight", "final.bias"}
