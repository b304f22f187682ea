"""Learning rates and weight decay by role, on ranks: closed form, and plain torch.optim.AdamW."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from diffmoe.config import Config
from diffmoe.data.examples import micro_batches
from diffmoe.diffusion import create_objective
from diffmoe.models.dit import DiT
from diffmoe.models.moe import routing_loss
from diffmoe.parallel.topology import Topology, create_topology
from diffmoe.parallel.zero import owned_ranges
from diffmoe.training.ema import EMA
from diffmoe.training.step import TrainingStep, build
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import random_batch, randomize, tiny_config

STEPS = 3
RATE, DECAY, MUON_RATE, MUON_DECAY = 0.3, 0.05, 0.02, 0.5
MULTIPLIERS = {"embedding": 0.5, "router": 0.25, "experts": 2.0, "final": 3.0}


class Case(NamedTuple):
    world: int
    ranks: int
    stage: int
    more: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    def config(self) -> Config:
        return tiny_config(
            model__depth=2,
            moe__token_pool="global",
            optimizer__learning_rate=RATE,
            optimizer__eps=1.0,  # far above the gradients: AdamW is momentum SGD
            optimizer__weight_decay=DECAY,
            optimizer__warmup_samples=16,
            optimizer__rate_multipliers=MULTIPLIERS,
            parallel__expert_parallel=self.ranks,
            parallel__zero_stage=self.stage,
            **self.more,
        )


MUON = {
    "optimizer__type": "muon",
    "optimizer__muon__learning_rate": MUON_RATE,
    "optimizer__muon__weight_decay": MUON_DECAY,
}
BF16 = {"training__precision": "bf16"}
CASES = [Case(1, 1, 1), Case(2, 2, 2), Case(2, 2, 1, MUON), Case(2, 1, 2, BF16)]


def written(name: str) -> tuple[float, bool]:
    """Multiplier of a parameter, and whether it decays."""
    if name.startswith(("patch_embed.", "timestep_embed.", "label_embed.")):
        return 0.5, False
    if name.endswith(".router"):
        return 0.25, False
    if ".experts." in name:
        return 2.0, ".w_" in name
    return 3.0 if name.startswith("final.") else 1.0, name.endswith(".weight")


def is_of_muon(name: str) -> bool:
    return name.endswith(
        (".w_in", ".w_out", ".qkv.weight", ".proj.weight", ".0.feed_forward.fc1.weight")
    ) or name.endswith(".0.feed_forward.fc2.weight")


def on_rank(cases: list[Case]) -> list[dict[str, Any]]:
    from megatron.core import parallel_state

    found = []
    for case in cases:
        topology = create_topology(case.ranks)
        found.append({"idle": idle(case.config(), topology)})
        if not case.more:
            found[-1] |= trained(case.config(), topology)
        parallel_state.destroy_model_parallel()
    return found


def started(config: Config, topology: Topology) -> tuple[Any, Any, list]:
    """Of random weights in the masters, so that no zero hides an error."""
    network, engine = build(config, {}, topology, torch.device("cpu"))
    randomize(network)
    owned = list(owned_ranges(engine, network, network.expert_parameters()))
    for one in owned:
        flat = network.get_parameter(one.name).detach().flatten()
        one.master.data.copy_(flat[one.start % len(flat) :][: len(one.master)])
    engine.spread_masters()
    return network, engine, owned


def idle(config: Config, topology: Topology) -> list[tuple[str, Tensor, Tensor]]:
    """One step without a gradient: what each piece was before and after."""
    network, engine, owned = started(config, topology)
    before = [one.master.detach().clone() for one in owned]
    engine.backward(sum(parameter.sum() for parameter in network.parameters()) * 0.0)
    engine.step()
    return [
        (one.name, was, one.master.detach().clone()) for one, was in zip(owned, before, strict=True)
    ]


def trained(config: Config, topology: Topology) -> dict[str, Any]:
    network, engine, owned = started(config, topology)
    step = TrainingStep(config, network, engine, EMA(engine, None), torch.device("cpu"))
    results = [
        step.run(step.prepare(random_batch(config, number, step.lanes), number))
        for number in range(STEPS)
    ]
    return {
        "losses": [one.losses["loss"] for one in results],
        "rates": [one.rates for one in results],
        "pieces": [(one.name, one.start, one.master.detach().clone()) for one in owned],
    }


@pytest.fixture(scope="module", params=[1, 2])
def told(request) -> list[tuple[Case, list[dict[str, Any]]]]:
    """Of each case of a world, what its ranks told."""
    cases = [case for case in CASES if case.world == request.param]
    ranks = run_ranks(request.param, on_rank, cases)
    return [(case, [rank[at] for rank in ranks]) for at, case in enumerate(cases)]


def test_without_a_gradient_matrices_shrink_by_rate_times_decay_and_nothing_else_moves(told):
    for case, ranks in told:
        pieces = [piece for rank in ranks for piece in rank["idle"]]
        config = case.config()
        assert {name for name, *_ in pieces} == {
            name for name, _ in DiT(config.model, config.moe).named_parameters()
        }
        for name, before, after in pieces:
            multiplier, decays = written(name)
            factor = 1 - RATE * multiplier * DECAY * decays
            if "optimizer__type" in case.more and is_of_muon(name):
                factor = 1 - MUON_RATE * multiplier * MUON_DECAY
            if factor == 1:
                assert torch.equal(after, before), name
            else:
                assert before.abs().max() > 1e-3
                torch.testing.assert_close(after, before * factor, atol=0, rtol=1e-6)


def one_process(config: Config) -> tuple[list[float], dict[str, Tensor]]:
    """Plain torch in float64, a group per parameter."""
    objective = create_objective(config)
    network = randomize(DiT(config.model, config.moe)).double()
    groups = []
    for name, parameter in network.named_parameters():
        multiplier, decays = written(name)
        groups.append({"params": [parameter], "times": multiplier, "weight_decay": DECAY * decays})
    adamw = torch.optim.AdamW(groups, lr=RATE, betas=config.optimizer.betas, eps=1.0)
    losses, lanes = [], range(config.data.lanes)
    for step in range(STEPS):
        for group in adamw.param_groups:
            group["lr"] = RATE * group["times"] * min(1, (step + 1) / 2)
        (examples,) = micro_batches(
            random_batch(config, step, lanes), config, lanes, step, objective
        )
        output = network(examples.x_t.double(), examples.t.double(), examples.condition)
        loss = objective.loss(
            output.prediction, examples.x_t, examples.data, examples.noise, examples.t
        )["loss"].mean()
        adamw.zero_grad()
        (loss + routing_loss(output.routing, config.moe)).backward()
        adamw.step()
        losses.append(loss.item())
    return losses, {name: p.detach().flatten() for name, p in network.named_parameters()}


def test_training_equals_plain_adamw_with_a_group_per_parameter(told):
    for case, ranks in told:
        if case.more:
            continue
        losses, weights = one_process(case.config())
        for rank in ranks:
            assert rank["losses"] == pytest.approx(losses, abs=2e-6)
            for name, start, piece in rank["pieces"]:
                expected = weights[name][start : start + len(piece)]
                error = (piece - expected).abs().max().item()
                assert error < 5e-6, (name, error)


def test_rates_are_reported_of_each_role_with_a_multiplier(told):
    case, ranks = told[0]
    assert not case.more
    for number, share in enumerate((0.5, 1.0, 1.0)):
        expected = {"learning_rate": RATE * share} | {
            f"{role}_learning_rate": RATE * times * share for role, times in MULTIPLIERS.items()
        }
        assert ranks[0]["rates"][number] == pytest.approx(expected, rel=1e-12)
