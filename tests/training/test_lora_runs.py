"""Runs of LoRA: what they leave, save and go on with, and what they are refused for."""

import shutil
from pathlib import Path

import pytest
import torch

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.lora import is_factor
from diffmoe.planning.layouts import Layout
from diffmoe.planning.memory import memory
from diffmoe.planning.parameters import parameter_table
from diffmoe.planning.submission import checkpoint_bytes
from diffmoe.training import preflight
from diffmoe.training.resume import find_checkpoint
from tests.helpers.runs import assert_identical, half_of, newest, pack, run_config, tensors, train


def test_the_base_stays_bit_for_bit_and_the_factors_train(lora_run: Config):
    base = lora_run.replace(
        {"output": lora_run.training.init, "lora": {}, "training.train_only": ()}
    )
    before, state = tensors(newest(base)), tensors(newest(lora_run))
    names = {name.partition("/")[2] for name in state if name.startswith("weights/")}
    factors = {name for name in names if is_factor(name)}
    assert len(factors) == 2 * 16
    for name in names - factors:
        # training.init takes the averages; in fp32, which bf16 would have rounded.
        stayed = torch.equal(state[f"weights/{name}"], before[f"ema/{name}"])
        assert stayed == (name != "label_embed.weight"), name
    trained = {*factors, "label_embed.weight"}
    for name in names:
        assert (f"exp_avg/{name}" in state) == (name in trained), name
        assert torch.equal(state[f"ema/{name}"], state[f"weights/{name}"]) == (name not in trained)
        assert state[f"weights/{name}"].any() or name not in factors, name


def test_parameters_and_bytes_are_counted(lora_run: Config):
    state, layout = tensors(newest(lora_run)), Layout(lora_run, 1, 2)
    held = sum(4 * one.numel() for name, one in state.items() if not name.startswith("buffers/"))
    assert held == checkpoint_bytes(layout)
    # Attention in 4 blocks, dense MLPs in 2, 4 experts in 2; and labels.
    dense = 4 * 2 * ((16 + 48) + (16 + 16)) + 2 * 2 * 2 * (16 + 64)
    experts = 2 * 4 * 2 * 2 * (16 + 64)
    sizes = layout.sizes
    assert (sizes.dense, sizes.experts) == (dense + 6 * 16, experts // 2)
    network = DiT(lora_run.model, lora_run.moe)
    assert sizes.frozen + sizes.frozen_experts == network.parameter_count() - 6 * 16
    lines = {line.split()[0]: line.split()[1:] for line in parameter_table(lora_run).splitlines()}
    rate = f"{lora_run.optimizer.learning_rate:g}"
    experts_w_in = "blocks.1.feed_forward.experts.w_in"
    assert lines[experts_w_in] == ["4x16x64", "experts", "frozen", "0", "0"]
    assert lines[f"{experts_w_in}_lora_a"] == ["4x16x2", "experts", "adamw", rate, "0"]
    assert lines[f"{experts_w_in}_lora_b"] == ["4x2x64", "experts", "adamw", rate, "0"]
    # In fp32 nothing of the base but its weights is held.
    plain = Layout(lora_run.replace({"training.precision": "fp32"}), 1, 2)
    assert memory(plain).moments == memory(plain).masters * 2 < memory(plain).parameters


def test_resuming_equals_not_stopping_bit_for_bit(lora_run: Config, tmp_path: Path):
    config = half_of(lora_run, tmp_path)
    assert train(config, world=2) == [True, True]
    assert_identical(tensors(newest(config)), tensors(newest(lora_run)))


def test_another_layout_goes_on_alike(lora_run: Config, tmp_path: Path):
    config = half_of(lora_run, tmp_path, parallel__expert_parallel=1, parallel__zero_stage=2)
    assert train(config) == [True]
    found, expected = tensors(newest(config)), tensors(newest(lora_run))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.startswith("weights/") and not is_factor(name) and "label" not in name:
            assert torch.equal(found[name], tensor), name
        elif name.startswith("ema/"):  # gradients in bf16, summed in another order
            torch.testing.assert_close(found[name], tensor, atol=0.02, rtol=0)


def test_other_factors_are_another_network(lora_run: Config, tmp_path: Path):
    config = half_of(lora_run, tmp_path, lora__rank=4)
    with pytest.raises(UserError, match=r"is of another network:\n  lora\.rank: 2 there, 4 now"):
        find_checkpoint(config, "auto", ["lora.rank"])


def test_what_cannot_train_is_refused_before_it_starts(lora_run: Config, tmp_path: Path):
    def refused(**changes) -> str:
        config = run_config(tmp_path, 1, **{"model__in_channels": 3, **changes})
        with pytest.raises(UserError) as caught:
            preflight.check(config, {}, 1)
        return str(caught.value)

    lora = {"lora__rank": 2, "training__init": lora_run.training.init}
    pack(tmp_path / "data", shape=(3, 8, 8))
    assert "training.init names none; give a run or a model" in refused(lora__rank=2)
    assert "lora.targets: atention names no weight" in refused(**lora, lora__targets=("atention",))
    # Of classes that the base does not know.
    shutil.rmtree(tmp_path / "data")
    pack(tmp_path / "data", shape=(3, 8, 8), class_names=["plane", "car", "frog", "cat", "dog"])
    told = refused(**lora)
    assert "label_embed.weight starts anew, and with lora.rank=2 it would stay so" in told
    assert told.endswith("add training.train_only='[label_embed.*]'")
    preflight.check(
        run_config(
            tmp_path, 1, model__in_channels=3, training__train_only=("label_embed.*",), **lora
        ),
        {},
        1,
    )
