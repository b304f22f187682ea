"""Which layouts there are, which one is recommended, and what a machine cannot do."""

from dataclasses import replace

import pytest

from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.planning.estimate import plan, recommend
from diffmoe.planning.layouts import Layout, possible_layouts
from diffmoe.planning.machine import Machine
from diffmoe.planning.parameters import parameter_table
from diffmoe.planning.traffic import traffic
from diffmoe.recipes import load_config
from tests.helpers.tiny import tiny_config
from tests.helpers.tools import forked

XL = load_config("diffmoe_xl_e16_flow")


def test_all_layouts_keep_the_batch():
    found = list(possible_layouts(XL, 4, 8))
    assert {one.expert_parallel for one in found} == {1, 2, 4, 8, 16}
    assert {one.micro_batch for one in found} == {1, 2, 4, 8}
    assert {one.micro_batch * one.accumulation * 32 for one in found} == {256}
    assert len(found) == len(set(found)) == 5 * 2 * 4 * 2
    for one in found:
        one.config.check_world(32)


def test_a_layout_that_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"batch_size=256 is not divisible by 3 nodes x 8 GPUs"):
        list(possible_layouts(XL, 3, 8))
    with pytest.raises(UserError, match=r"data\.lanes=32 is not divisible by 8 nodes x 8 GPUs"):
        list(possible_layouts(XL, 8, 8))
    with pytest.raises(UserError, match=r"expert_parallel=3 does not fit 32 ranks"):
        list(possible_layouts(XL, 4, 8, expert_parallel=3))


def test_the_recommended_one_fits_and_is_the_quickest():
    plans = [plan(layout, Machine()) for layout in possible_layouts(XL, 1, 8)]
    best = recommend(plans)
    assert best.fits
    assert best.seconds <= 1.02 * min(one.seconds for one in plans if one.fits)
    # On a small card checkpointing makes room; on a tiny one nothing does.
    small = [plan(one.layout, Machine(memory=16e9)) for one in plans]
    assert not plan(best.layout, Machine(memory=16e9)).fits
    assert recommend(small).memory.total <= 16e9
    with pytest.raises(
        UserError, match=r"no layout fits: the smallest, P=8 stage 2 micro-batch 4 x 8"
    ):
        recommend([replace(one, fits_gpu=False) for one in plans])


def test_groups_inside_a_node_send_nothing_between_nodes():
    def between(p: int) -> dict[str, float]:
        config = XL.replace({"parallel.expert_parallel": p})
        return {one.name: one.between for one in traffic(Layout(config, 4, 8))}

    assert between(8)["tokens to experts and back"] == 0
    assert between(8)["expert gradients"] > 0
    # 16 ranks over two nodes: half of the tokens cross.
    sixteen = Layout(XL.replace({"parallel.expert_parallel": 16}), 4, 8)
    tokens = traffic(sixteen)[0]
    assert tokens.between == tokens.bytes / 2
    assert tokens.within == tokens.bytes * 7 / 16
    # One way of one layer: 8 samples of 256 tokens, each taken once, width 1152, fp32.
    assert tokens.bytes == 14 * 4 * 8 * 256 * 1152 * 4


def test_parameters_are_listed_with_what_updates_them():
    config = tiny_config(
        optimizer__type="muon",
        optimizer__learning_rate=0.25,
        optimizer__weight_decay=0.5,
        optimizer__muon__learning_rate=0.125,
        optimizer__muon__scale="original",
        optimizer__rate_multipliers={"router": 0.5, "experts": 2.0},
    )
    head, *lines, total = parameter_table(config).splitlines()
    assert head.split() == ["parameter", "shape", "role", "by", "rate", "decay", "matrices"]
    found = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert list(found) == [name for name, _ in DiT(config.model, config.moe).named_parameters()]
    prefix = "blocks.1.feed_forward"
    assert found[f"{prefix}.experts.w_in"] == "4x16x64 experts muon 0.25 0 4 of 64x16, times 2"
    qkv = "48x16 attention muon 0.125 0 3 of 16x16, times 1"
    assert found["blocks.1.attention.qkv.weight"] == qkv
    assert found[f"{prefix}.router"] == "4x16 router adamw 0.125 0"
    assert found[f"{prefix}.experts.b_in"] == "4x64 experts adamw 0.5 0"
    assert found["final_adaln.weight"] == "32x16 modulation adamw 0.25 0.5"
    assert total.endswith("million by adamw")
    adamw = parameter_table(tiny_config())
    assert " muon " not in adamw
    assert "by muon" not in adamw


@pytest.mark.slow
def test_the_command_prints_a_table_and_one_layout():
    done = forked(
        *("tools/plan.py", "--recipe", "xl_e16", "--nodes", "4"),
        *("--gpus-per-node", "8", "--gpu-memory", "80", "--expert-parallel", "8"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nP=8 ") == 16
    assert "recommended: parallel.expert_parallel=8 parallel.zero_stage=2" in done.stdout
    assert "all_reduce of dense gradients over 32 ranks" in done.stdout
    assert "assumed: matrix products achieve" in done.stdout
