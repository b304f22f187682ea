"""A dense model becomes a mixture, a mixture grows: the output stays, and training goes on."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import diffmoe
from diffmoe.conversion.adapting import adapt
from diffmoe.conversion.upcycling import grow, upcycle
from diffmoe.errors import UserError
from diffmoe.export.sources import Source, checkpoint_source
from diffmoe.export.tensors import empty_network, fill
from diffmoe.export.writing import write_exported
from diffmoe.models.dit import DiT
from tests.helpers.models import source_of
from tests.helpers.runs import metrics, newest, pack, run_config, tensors, train
from tests.helpers.tiny import tiny_config

ROUTINGS = ["per_token", "pooled", "static"]


def network(source: Source) -> DiT:
    metadata = source.checked().metadata
    return fill(empty_network(metadata.model, metadata.moe), lambda name, _: source.read(name))


@torch.no_grad()
def output(model: DiT, routing: str = "per_token", samples: int = 4) -> Tensor:
    """routing: one of evaluation's, or train."""
    model.train(routing == "train")
    if routing != "train" and model.routing is not None:
        model.route_by(routing)
    x = torch.randn(samples, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    t, labels = torch.tensor([0.1, 0.4, 0.7, 0.95]), torch.tensor([0, 2, 4, 5])
    some = torch.arange(samples) % 4
    return model(x, t[some], labels[some]).prediction


def off(model: DiT, dense: Tensor, routing: str) -> float:
    return float((output(model, routing) - dense).norm() / dense.norm())


@pytest.fixture(scope="module")
def dense() -> Source:
    return source_of(tiny_config(moe__type="dense"))


@pytest.mark.parametrize("routing", [*ROUTINGS, "train"])
@pytest.mark.parametrize("every_block", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_with_a_shared_expert_the_output_is_the_dense_model_s_bit_for_bit(
    dense: Source, routing: str, every_block: bool, noise: float
):
    upcycled = upcycle(dense, 8, every_block=every_block, noise=noise)
    model = network(upcycled)
    assert len(model.moe_layers) == (4 if every_block else 2)
    assert torch.equal(output(model, routing), output(network(dense)))
    w_in = model.moe_layers[0].experts.w_in
    assert torch.equal(w_in[0], w_in[7]) == (noise == 0)
    assert w_in.abs().min() == 0 or w_in.std() > 0.1  # experts begin with the dense first layer


def test_a_wide_head_stays_as_it_is():
    head = {"width": 20, "depth": 2, "heads": 1}
    dense = source_of(tiny_config(moe__type="dense", model__wide_head=head, model__rope=True))
    model = network(upcycle(dense, 4, every_block=True))
    assert len(model.moe_layers) == 4
    assert torch.equal(output(model), output(network(dense)))
    for name in dense.shapes:
        if name.startswith("wide_head."):
            assert torch.equal(model.get_parameter(name), dense.read(name)), name


def test_copies_equal_the_dense_model_at_full_capacity(dense: Source):
    model, expected = network(upcycle(dense, 8, how="copies")), output(network(dense))
    assert model.moe_config.capacity == 8
    for routing in [*ROUTINGS, "train"]:
        assert off(model, expected, routing) < 1e-6


# Batches, of 16 tokens a sample, whose S / E * E in floats is less than S.
@pytest.mark.parametrize(
    ("experts", "samples"), [(7, 61), (11, 15), (13, 15), (14, 61), (23, 13), (47, 3), (49, 1)]
)
def test_copies_are_exact_where_floats_lose_a_token(dense: Source, experts: int, samples: int):
    assert int(16 * samples / experts * experts) == 16 * samples - 1
    expected = output(network(dense), samples=samples)
    model = network(upcycle(dense, experts, how="copies"))
    for routing in ("static", "train"):
        found = output(model, routing, samples)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_copies_at_a_lower_capacity_are_right_on_average_alone(dense: Source):
    expected, errors = output(network(dense)), {}
    for capacity in (1, 2, 4, 8):
        model = network(upcycle(dense, 8, how="copies", capacity=capacity))
        assert model.moe_config.inference == ("per_token" if capacity == 8 else "static")
        errors[capacity] = off(model, expected, "train")
    assert errors[1] > errors[2] > errors[4] > errors[8]
    assert errors[1] > 0.05
    assert errors[8] < 1e-6


def test_noise_is_seeded_and_in_the_tensor_s_own_measure(dense: Source):
    name = "blocks.1.feed_forward.experts.w_in"
    plain = upcycle(dense, 4).read(name)
    noisy = upcycle(dense, 4, noise=0.1, seed=1).read(name)
    assert torch.equal(noisy, upcycle(dense, 4, noise=0.1, seed=1).read(name))
    assert not torch.equal(noisy, upcycle(dense, 4, noise=0.1, seed=2).read(name))
    assert (noisy - plain).std() / plain.std() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("family", "routings"),
    [
        ("diffmoe", [*ROUTINGS, "train"]),
        ("expert_choice", ["static", "train"]),
        ("token_choice", ["static", "train"]),
        ("race", [*ROUTINGS, "train"]),
        ("promoe", ["static", "train"]),
        ("dsmoe", ["static", "train"]),
    ],
)
@pytest.mark.parametrize("times", [2, 3, 4])
def test_a_grown_mixture_computes_the_same(family: str, routings: list[str], times: int):
    source = source_of(tiny_config(moe__type=family, moe__top_k=2 if family == "dsmoe" else 1))
    grown, model = grow(source, 4 * times), network(source)
    assert (grown.metadata.moe.experts, grown.metadata.moe.capacity) == (4 * times, times)
    for routing in routings:
        assert off(network(grown), output(model, routing), routing) < 1e-6


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("scale", [2.0, "experts"])
def test_a_mixture_of_other_gates_grown_computes_the_same(gate: str, scale: float | str):
    source = source_of(tiny_config(moe__gate=gate, moe__gate_scale=scale))
    grown, model = grow(source, 8), network(source)
    for routing in ["train", *ROUTINGS]:
        assert off(network(grown), output(model, routing), routing) < 1e-6


def test_copies_have_gates_that_sum_to_1():
    dense = source_of(tiny_config(moe__type="dense", moe__gate="identity", moe__gate_scale=3.0))
    made = upcycle(dense, 4, how="copies").metadata.moe
    assert (made.gate, made.gate_factor) == ("softmax", 1.0)


def test_growing_keeps_the_originals_and_moves_the_copies():
    source = source_of(tiny_config())
    grown = grow(source, 8, noise=0.05)
    for name in ("experts.w_out", "router", "capacity_predictor.out.bias"):
        name = f"blocks.3.feed_forward.{name}"
        before, after = source.read(name), grown.read(name)
        assert torch.equal(after[:4], before)
        assert 0.02 < (after[4:] - before).std() / before.std() < 0.09
    with_less_noise = grow(source, 8, noise=0.001)
    assert off(network(with_less_noise), output(network(source)), "train") < 0.1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda dense, moe: upcycle(moe, 8), "already has 4 experts; use --grow"),
        (lambda dense, moe: upcycle(dense, 1), "choose at least 2"),
        (lambda dense, moe: upcycle(dense, 4, capacity=5), "above 0, at most 4"),
        (lambda dense, moe: upcycle(dense, 4, noise=-1).read("blocks.1.feed_forward.experts.b_in"),
         "--noise -1"),
        (lambda dense, moe: grow(dense, 8), "is dense; use --upcycle"),
        (lambda dense, moe: grow(moe, 2), "Fewer are refused: neither dropping nor averaging"),
        (lambda dense, moe: grow(moe, 6), "has 4; choose a multiple, such as 8"),
        (lambda dense, moe: grow(moe, 4), "has 4; choose a multiple, such as 8"),
        (lambda dense, moe: grow(source_of(tiny_config(moe__type="dsmoe")), 8), "from moe.top_k=2"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_says_why(change, told: str, dense: Source):
    with pytest.raises(UserError, match=told):
        change(dense, source_of(tiny_config()))


@pytest.fixture(scope="module")
def dense_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model after some training, in a folder beside its data."""
    folder = tmp_path_factory.mktemp("dense")
    pack(folder / "data")
    config = run_config(folder, 6, moe__type="dense", optimizer__learning_rate=0.003)
    train(config)
    with checkpoint_source(Path(config.output), "live") as source:
        write_exported(source, folder / "dense")
    return folder


def from_weights(folder: Path, name: str, steps: int = 1, world: int = 1, **changes):
    """A run that starts from the exported model of that name."""
    output = changes.pop("output", folder / f"run-{name}-{world}")
    config = run_config(
        folder, steps, output=str(output), training__init=str(folder / name), **changes
    )
    train(config, world)
    return config


MIXTURE = {"moe__experts": 4, "moe__shared_expert_ratio": 4.0}


@pytest.mark.slow
def test_training_starts_where_the_dense_model_stands_and_experts_diverge(dense_export: Path):
    folder = dense_export
    with checkpoint_source(folder / "run", "live") as source:
        write_exported(upcycle(source, 4), folder / "mixture")
    dense = metrics(from_weights(folder, "dense", moe__type="dense"))
    random = metrics(run_with_random_weights(folder))
    spread = from_weights(folder, "mixture", 8, world=2, parallel__expert_parallel=2, **MIXTURE)
    mixture = metrics(spread)
    # Equal to rounding: two ranks sum what one summed.
    assert mixture[0]["loss"] == pytest.approx(dense[0]["loss"], rel=1e-5)
    assert abs(random[0]["loss"] - dense[0]["loss"]) > 0.01
    after = tensors(newest(spread))
    before = diffmoe.load(folder / "mixture", device="cpu").state_dict()
    for layer in ("blocks.1", "blocks.3"):
        name = f"{layer}.feed_forward.experts.w_out"
        experts = after[f"weights/{name}"].view(4, -1)
        assert before[name].count_nonzero() == 0
        for i in range(4):
            for j in range(i):
                apart = (experts[i] - experts[j]).norm() / experts[i].norm()
                assert apart > 0.1, (layer, i, j)


def run_with_random_weights(folder: Path):
    config = run_config(folder, 1, output=str(folder / "random"), moe__type="dense")
    train(config)
    return config


def test_a_run_begins_with_the_weights_in_masters_averages_and_thresholds(dense_export: Path):
    folder, config = dense_export, tiny_config(moe__shared_expert_ratio=4.0)
    write_exported(source_of(config), folder / "exact")
    run = from_weights(
        folder, "exact", world=2, parallel__expert_parallel=2, optimizer__learning_rate=1e-30,
        moe__shared_expert_ratio=4.0, moe__threshold_ema=0.0, training__precision="bf16",
    )  # fmt: skip
    expected, found = source_of(config), tensors(newest(run))
    for name in expected.shapes:
        for prefix in () if name.endswith(".thresholds") else ("weights", "ema"):
            stored = found[f"{prefix}/{name}"]
            assert torch.equal(stored.view(-1), expected.read(name).view(-1)), name
    assert run.training.precision == "bf16"  # and still no rounding of the masters


@pytest.mark.parametrize(
    ("init", "changes", "told"),
    [
        ("data", {}, "training.init=.*data is not a complete checkpoint"),
        ("dense", {"moe__type": "dense", "model__heads": 4}, "set model.heads=2"),
        ("dense", {"moe__expert_ratio": 2.0}, "its MLPs do not fit these experts"),
    ],
)
def test_weights_of_another_network_are_refused_before_work(
    init: str, changes: dict, told: str, dense_export: Path
):
    with pytest.raises(Exception, match=told):
        from_weights(dense_export, init, output=dense_export / "refused", **changes)
    assert not (dense_export / "refused").exists()


def test_the_converter_s_advice_lets_a_run_start_from_its_model(tmp_path: Path):
    mixture = upcycle(source_of(tiny_config(moe__type="dense")), 8, every_block=True, capacity=2.0)
    write_exported(mixture, tmp_path / "mixture")
    start = tiny_config(training__init=str(tmp_path / "mixture"), output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"set moe\.shared_expert_ratio=4\.0 moe\.every_block=true"):
        adapt(mixture, start)
    pairs = (setting.split("=") for setting in mixture.notes[-1].split()[3:])
    settings = {key: yaml.safe_load(value) for key, value in pairs}
    assert settings["moe.capacity"] == 2
    assert adapt(mixture, start.replace(settings)).notes == ()
