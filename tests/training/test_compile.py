"""training.compile: the same run to rounding, and nothing that breaks a block's graph."""

from pathlib import Path

import pytest
import torch

from diffmoe.config import Config
from diffmoe.models.dit import DiT
from diffmoe.models.moe import routing_loss
from diffmoe.parallel.topology import create_topology
from diffmoe.training.step import build
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics, newest, pack, run_config, tensors, train
from tests.helpers.tiny import FROZEN, random_batch, randomize, tiny_config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe__activation": "swiglu", "moe__shared_expert_ratio": 2.0, "model__rope": True},
        {"model__text": FROZEN},
        {"model__wide_head": {"width": 20, "heads": 2}},
    ],
)
@pytest.mark.usefixtures("compiler")
def test_a_block_is_one_graph_in_training(changes: dict):
    config = tiny_config(**changes)
    network = randomize(DiT(config.model, config.moe)).train()
    batch = random_batch(config, 0, range(config.data.lanes))
    inputs = batch.latents, torch.rand(len(batch.latents)), batch.text or batch.labels
    expected = network(*inputs).prediction
    for block in network.all_blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(network(*inputs).prediction, expected, rtol=1e-5, atol=1e-5)


def test_the_blocks_of_a_wide_head_are_compiled_too():
    config = tiny_config(
        model__wide_head={"width": 20, "heads": 2}, model__depth=2, training__compile=True
    )
    assert run_ranks(1, compiled_blocks, config) == [[True] * 4]


def compiled_blocks(config: Config) -> list[bool]:
    network, _ = build(config, {}, create_topology(1), torch.device("cpu"))
    return [block._compiled_call_impl is not None for block in network.all_blocks]


def test_compiled_bf16_gradients_are_those_of_bf16():
    # 64 tokens of width 32: with fewer, tokens in the layout of the patches did no harm.
    config = tiny_config(
        model__input_size=32,
        model__patch_size=4,
        model__width=32,
        model__depth=2,
        data__lanes=4,
        training__batch_size=32,
    )
    network = randomize(DiT(config.model, config.moe)).to_bf16().train()
    batch = random_batch(config, 0, range(config.data.lanes))
    inputs = batch.latents, torch.rand(len(batch.latents)), batch.labels
    parameters = [one for one in network.parameters() if one.requires_grad]

    def gradients() -> list[torch.Tensor]:
        output = network(*inputs)
        loss = output.prediction.square().mean() + routing_loss(output.routing, config.moe)
        return torch.autograd.grad(loss, parameters)

    expected = gradients()
    for block in network.blocks:
        block.compile()
    for one, other in zip(gradients(), expected, strict=True):
        scale = other.float().norm()
        assert scale > 0
        assert (one.float() - other.float()).norm() < 0.05 * scale


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_run_is_the_same_to_rounding(tmp_path: Path, checkpointing: bool):
    pack(tmp_path / "data")
    results = []
    for compiled in (False, True):
        config = run_config(
            tmp_path,
            3,
            output=str(tmp_path / f"compiled-{compiled}"),
            model__depth=2,
            parallel__expert_parallel=2,
            training__activation_checkpointing=checkpointing,
            training__compile=compiled,
            # With eps far above the gradients AdamW is momentum SGD, and rounding stays small.
            optimizer__eps=1.0,
        )
        train(config, world=2)
        results.append(([line["loss"] for line in metrics(config)], tensors(newest(config))))
    (losses, state), (compiled_losses, compiled_state) = results
    assert compiled_losses == pytest.approx(losses, rel=1e-6)
    for name, tensor in state.items():
        torch.testing.assert_close(compiled_state[name], tensor, atol=1e-6, rtol=1e-5)
