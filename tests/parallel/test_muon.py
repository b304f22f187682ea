"""Muon against its definition: one matrix at a time, one process, float64."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from diffmoe.config import Config, MuonConfig
from diffmoe.data.examples import micro_batches
from diffmoe.diffusion import create_objective
from diffmoe.models.dit import DiT
from diffmoe.models.matrices import hidden_matrices
from diffmoe.models.moe import routing_loss
from diffmoe.parallel.matrix_layout import Cut
from diffmoe.parallel.orthogonalize import Matrices, flops, orthogonalize
from diffmoe.parallel.topology import create_topology
from diffmoe.parallel.zero import owned_ranges
from diffmoe.training.ema import EMA
from diffmoe.training.step import TrainingStep, build
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import BYTES, random_batch, randomize, tiny_config

STEPS, CLIP = 3, 0.3


# Newton-Schulz -------------------------------------------------------------------------------


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """f(s / |s|) of each singular value s, by its decomposition; in float64."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm().clamp(min=1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ vt


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)], ids=str)
def test_every_singular_value_follows_the_polynomial(shape: tuple, method: str):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    stack[1] *= 1e6  # of the scale of a matrix nothing is left
    stack[2, 1:] = stack[2, :1]  # rank 1
    for steps in (1, 2, 5, 9):
        expected = torch.stack([newton_schulz(one, steps) for one in stack])
        found = orthogonalize(stack, steps, method)
        # Gram matrices square what rounding leaves of a rank: 1e-16 of the largest value grows.
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
        alone = torch.stack([orthogonalize(one[None], steps, method)[0] for one in stack])
        torch.testing.assert_close(found, alone, atol=1e-12, rtol=0)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        found = orthogonalize(stack[:2].float(), 5, method, dtype)
        assert found.dtype == dtype
        expected = torch.stack([newton_schulz(one, 5) for one in stack[:2]])
        assert (found - expected).norm() < tolerance * expected.norm()
    assert orthogonalize(torch.zeros(1, *shape), 5, method).count_nonzero() == 0


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_operations_are_counted(method: str, steps: int):
    from torch.utils.flop_counter import FlopCounterMode

    for stack in (Matrices(2, 8, 24, True), Matrices(3, 24, 8, False), Matrices(1, 8, 8, False)):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.randn(stack[:3]), steps, method)
        assert flops(stack, steps, method) == counter.get_total_flops()


# Who gets which matrix -----------------------------------------------------------------------


def test_matrices_are_those_of_blocks():
    config = tiny_config(
        model__text=BYTES, moe__shared_expert_ratio=2.0, moe__shared_expert_activation="swiglu"
    )
    found = hidden_matrices(DiT(config.model, config.moe))
    kinds = {
        name.split(".", 2 + name.startswith("text_embed"))[-1]: stack
        for name, stack in found.items()
        if name.startswith(("blocks.1", "text_embed"))
    }
    assert kinds == {
        "attention.qkv.weight": Matrices(3, 16, 16, False),
        "attention.proj.weight": Matrices(1, 16, 16, False),
        "cross_attention.q.weight": Matrices(1, 16, 16, False),
        "cross_attention.kv.weight": Matrices(2, 16, 16, False),
        "cross_attention.proj.weight": Matrices(1, 16, 16, False),
        "feed_forward.experts.w_in": Matrices(4, 16, 64, True),
        "feed_forward.experts.w_out": Matrices(4, 64, 16, True),
        "feed_forward.shared_expert.gate.weight": Matrices(1, 32, 16, False),
        "feed_forward.shared_expert.up.weight": Matrices(1, 32, 16, False),
        "feed_forward.shared_expert.down.weight": Matrices(1, 16, 32, False),
        "0.attention.qkv.weight": Matrices(3, 8, 8, False),
        "0.attention.proj.weight": Matrices(1, 8, 8, False),
        "0.feed_forward.fc1.weight": Matrices(1, 32, 8, False),
        "0.feed_forward.fc2.weight": Matrices(1, 8, 32, False),
    }


def test_scales_know_what_is_input_and_what_is_output():
    expert, linear = Matrices(4, 16, 64, True), Matrices(1, 64, 16, False)
    assert expert.factor("original") == linear.factor("original") == 2.0
    back = [Matrices(4, 64, 16, True), Matrices(1, 16, 64, False)]
    assert [one.factor("original") for one in back] == [1.0, 1.0]
    assert [one.factor("match_rms_adamw") for one in (expert, *back)] == [pytest.approx(1.6)] * 3


# Cut matrices --------------------------------------------------------------------------------


def test_the_rank_where_a_matrix_begins_gathers_it():
    """Partitions of 10: [0, 4) whole, [4, 39) over four, [39, 45) over two, [45, 50) whole."""
    stacks = [Matrices(1, 1, size, False) for size in (4, 35, 6, 5)]
    spans = list(zip((0, 4, 39, 45), stacks, strict=True))
    cuts = [Cut.of(spans, 10, 5, rank) for rank in range(5)]
    assert [(one.head, one.tail) for one in cuts] == [(0, 6), (10, 0), (10, 0), (9, 1), (5, 0)]
    assert [one.owned for one in cuts] == [stacks[1], None, None, stacks[2], None]
    assert cuts[0].receives == [6, 10, 10, 9, 0]
    assert cuts[3].receives == [0, 0, 0, 1, 5]
    assert cuts[3].sends == [9, 0, 0, 1, 0]
    for a in range(5):
        assert [cuts[a].sends[b] for b in range(5)] == [cuts[b].receives[a] for b in range(5)]
    assert Cut.of(spans[:1], 10, 5, 0) is None


# Steps ---------------------------------------------------------------------------------------


class Case(NamedTuple):
    ranks: int
    stage: int
    changes: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    def config(self) -> Config:
        # Sizes of which partitions' ends cut matrices, dense ones and experts.
        values: dict[str, Any] = {
            "model__width": 20,
            "model__depth": 2,
            "model__mlp_ratio": 3.0,
            "moe__experts": 2,
            "moe__shared_expert_ratio": 1.0,
            "moe__activation": "swiglu",
            "moe__token_pool": "global",
            "optimizer__type": "muon",
            "optimizer__learning_rate": 0.3,
            "optimizer__eps": 1.0,  # far above the gradients: AdamW is momentum SGD
            "optimizer__weight_decay": 0.02,
            "optimizer__muon__learning_rate": 0.03,
            "optimizer__muon__weight_decay": 0.5,
            "optimizer__gradient_clipping": CLIP,
            "parallel__expert_parallel": self.ranks,
            "parallel__zero_stage": self.stage,
        }
        return tiny_config(**{**values, **self.changes})


ACCUMULATED = {"training__accumulation": 2}
ORIGINAL = {
    "optimizer__muon__scale": "original",
    "optimizer__muon__newton_schulz": "gram",
    "optimizer__muon__momentum": 0.5,
    "moe__activation": "gelu",
}
BF16 = {"training__precision": "bf16"}
CASES = {
    1: [Case(1, 1), Case(1, 2, BF16)],
    2: [
        Case(1, 1, {"moe__experts": 3}),
        Case(2, 1, ORIGINAL),
        Case(2, 2, ACCUMULATED),
        Case(1, 2, BF16 | ACCUMULATED),
    ],
    4: [Case(1, 1, ORIGINAL), Case(2, 2), Case(4, 1, {"moe__experts": 4}), Case(2, 1, BF16)],
}


def on_rank(cases: list[Case]) -> list[dict[str, Any]]:
    from megatron.core import parallel_state

    found = []
    for case in cases:
        topology = create_topology(case.ranks)
        found.append(steps_on_rank(case.config(), topology))
        parallel_state.destroy_model_parallel()
    return found


def steps_on_rank(config: Config, topology: Any) -> dict[str, Any]:
    """Of each step, what this rank's pieces were before and after, and what they were given."""
    cpu = torch.device("cpu")
    network, engine = build(config, {}, topology, cpu)
    randomize(network)
    experts, zero = network.expert_parameters(), engine.optimizer
    owned = list(owned_ranges(engine, network, experts))
    for one in owned:
        flat = network.get_parameter(one.name).detach().flatten()
        one.master.data.copy_(flat[one.start % len(flat) :][: len(one.master)])
    step = TrainingStep(config, network, engine, EMA(engine, None), cpu)
    gradients: dict[int, Tensor] = {}
    work = zero._optimizer_step

    def noting(group: int) -> None:
        master = zero.single_partition_of_fp32_groups[group]
        gradients[id(master)] = master.grad.clone()
        work(group)

    zero._optimizer_step = noting
    told: dict[str, Any] = {"steps": [], "losses": [], "norms": []}
    for number in range(STEPS):
        before = {one.name: one.master.detach().clone() for one in owned}
        result = step.run(step.prepare(random_batch(config, number, step.lanes), number))
        assert result.rates["muon_learning_rate"] == config.optimizer.muon.learning_rate
        told["losses"].append(result.losses["loss"])
        told["norms"].append(result.gradient_norm)
        told["steps"].append(
            [
                {
                    "name": one.name,
                    "shape": one.shape,
                    "start": one.start,
                    "before": before[one.name],
                    "after": one.master.detach().clone(),
                    "gradient": gradients[id(one.partition)].narrow(0, one.offset, len(one.master)),
                    **{k: t.clone() for k, t in one.state(zero.optimizer).items()},
                }
                for one in owned
            ]
        )
    told["cuts"] = [one.cut is not None for one in zero.optimizer.layouts.values()]
    told["compiled"] = dict(torch._dynamo.utils.counters["frames"])
    return told


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)])
def runs(request) -> list[tuple[Config, list[dict[str, Any]]]]:
    """Of a world, what its ranks told of each case."""
    cases = CASES[request.param]
    ranks = run_ranks(request.param, on_rank, cases)
    return [(case.config(), [one[at] for one in ranks]) for at, case in enumerate(cases)]


def whole(ranks: list[dict[str, Any]], step: int, key: str) -> dict[str, Tensor]:
    """A step's tensors, put together of all ranks' pieces."""
    found: dict[str, Tensor] = {}
    for piece in (piece for rank in ranks for piece in rank["steps"][step] if key in piece):
        total = torch.Size(piece["shape"]).numel()
        flat = found.setdefault(piece["name"], torch.full((total,), torch.nan))
        flat[piece["start"] : piece["start"] + len(piece[key])] = piece[key]
    shapes = {piece["name"]: piece["shape"] for rank in ranks for piece in rank["steps"][step]}
    assert all(tensor.isfinite().all() for tensor in found.values())  # nobody's piece is missing
    return {name: tensor.view(shapes[name]) for name, tensor in found.items()}


def split(name: str, tensor: Tensor) -> list[Tensor] | None:
    """The matrices of a parameter, (out, in) each; None: AdamW's. Views."""
    if ".experts.w_" in name:
        return [one.t() for one in tensor]
    if name.endswith("attention.qkv.weight"):
        return list(tensor.chunk(3))
    if name.startswith("blocks.") and name.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
        return [tensor]
    return None


def decays(name: str) -> bool:
    """Of AdamW's: predictors, adaLN and the last layer, no biases."""
    return name.endswith(".weight") and "_embed." not in name


@torch.no_grad()
def muon_update(weight: Tensor, gradient: Tensor, momentum: Tensor, muon: MuonConfig) -> None:
    """The definition, of one matrix (out, in), in place."""
    assert muon.learning_rate is not None
    momentum.mul_(muon.momentum).add_((1 - muon.momentum) * gradient)
    update = muon.momentum * momentum + (1 - muon.momentum) * gradient
    x = newton_schulz(update, muon.steps)
    out, into = weight.shape
    scale = 0.2 * max(out, into) ** 0.5
    if muon.scale == "original":
        scale = max(1, out / into) ** 0.5
    weight.mul_(1 - muon.learning_rate * muon.weight_decay).sub_(muon.learning_rate * scale * x)


def test_each_step_is_the_definition_of_what_it_was_given(runs):
    """Whole matrices, whoever holds which part; the gradients are those after clipping."""
    for config, ranks in runs:
        momenta: dict[str, Tensor] = {}
        muon = config.optimizer.muon
        bf16 = config.training.precision == "bf16"
        for step in range(STEPS):
            before, given = whole(ranks, step, "before"), whole(ranks, step, "gradient")
            after, kept = whole(ranks, step, "after"), whole(ranks, step, "momentum")
            moved = [name for name, weight in before.items() if split(name, weight)]
            assert set(kept) == set(moved)
            assert set(whole(ranks, step, "exp_avg")) == set(before) - set(moved)
            norm = torch.stack([one.double().norm() for one in given.values()]).norm()
            assert norm.item() == pytest.approx(CLIP, rel=1e-4)
            for name in moved:
                weight, gradient = before[name].double(), given[name].double()
                momentum = momenta.setdefault(name, torch.zeros_like(gradient))
                parts = [split(name, one) for one in (weight, gradient, momentum)]
                for one in zip(*parts, strict=True):
                    muon_update(*one, muon)
                torch.testing.assert_close(kept[name].double(), momentum, atol=1e-7, rtol=1e-5)
                if bf16:
                    weight = in_bf16(before[name], given[name], kept[name], name, muon)
                # Elements move by about 6e-3; Newton-Schulz amplifies what is smallest.
                error = (after[name] - weight).abs().max().item()
                assert error < 2e-6, (name, error)


def in_bf16(
    weight: Tensor, gradient: Tensor, momentum: Tensor, name: str, muon: MuonConfig
) -> Tensor:
    """The definition from fp32 momentum on, Newton-Schulz in bf16: its rounding is large and ours.

    Directions in which a gradient has nothing but rounding are moved by about as much as others.
    """
    weight, update = weight.clone(), gradient.lerp(momentum, muon.momentum)
    for one, matrix in zip(split(name, weight), split(name, update), strict=True):
        x = orthogonalize(matrix[None], muon.steps, "standard", torch.bfloat16)[0].float()
        scale = muon.learning_rate * 0.2 * max(one.shape) ** 0.5
        one.mul_(1 - muon.learning_rate * muon.weight_decay).sub_(scale * x)
    return weight


def one_process(config: Config) -> dict[str, Any]:
    """Plain torch in float64: the definition of Muon, and AdamW."""
    optimizer = config.optimizer
    objective = create_objective(config)
    network = randomize(DiT(config.model, config.moe)).double()
    weights = dict(network.named_parameters())
    groups = [
        {"params": [one], "weight_decay": optimizer.weight_decay * decays(name)}
        for name, one in weights.items()
        if split(name, one) is None
    ]
    adamw = torch.optim.AdamW(
        groups, lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.eps
    )
    momenta = {name: torch.zeros_like(one) for name, one in weights.items()}
    lanes = range(config.data.lanes)
    told: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        network.zero_grad()
        losses = []
        batch = random_batch(config, step, lanes)
        for examples in micro_batches(batch, config, lanes, step, objective):
            output = network(examples.x_t.double(), examples.t.double(), examples.condition)
            loss = objective.loss(
                output.prediction, examples.x_t, examples.data, examples.noise, examples.t
            )["loss"].mean()
            parts = config.training.accumulation
            ((loss + routing_loss(output.routing, config.moe)) / parts).backward()
            losses.append(loss.item() / parts)
        told["losses"].append(sum(losses))
        told["norms"].append(torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP).item())
        adamw.step()
        for name, weight in weights.items():
            if split(name, weight) is None:
                continue
            three = (weight.detach(), weight.grad, momenta[name])
            for one in zip(*(split(name, tensor) for tensor in three), strict=True):
                muon_update(*one, optimizer.muon)
    told["weights"] = {name: weight.detach() for name, weight in weights.items()}
    return told


def test_training_equals_one_process_on_any_layout(runs):
    expected: dict[str, dict[str, Any]] = {}
    for config, ranks in runs:
        if config.training.precision == "bf16":
            continue
        alone = config.replace({"parallel.expert_parallel": 1, "parallel.zero_stage": 1})
        key = alone.to_yaml()
        if key not in expected:
            expected[key] = one_process(alone)
        told = expected[key]
        assert min(told["norms"]) > CLIP  # clipping acts
        for rank in ranks:
            assert rank["losses"] == pytest.approx(told["losses"], abs=2e-6)
            assert rank["norms"] == pytest.approx(told["norms"], rel=1e-5)
        for name, found in whole(ranks, STEPS - 1, "after").items():
            error = (found - told["weights"][name]).abs().max().item()
            assert error < 1e-5, (name, error)


def test_partitions_cut_matrices_and_nothing_is_compiled(runs):
    for _, ranks in runs:
        assert all(rank["compiled"] == {} for rank in ranks)
    if len(ranks) > 1:
        for kind in (0, 1):  # dense matrices, experts
            assert any(ranks[0]["cuts"][kind] for _, ranks in runs)
