"""LoRA's factors: what they add, what they leave, and which weights get them."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.frozen import frozen_names
from diffmoe.models.lora import factor_names, is_factor, merged_state, targeted
from diffmoe.models.matrices import hidden_matrices
from tests.helpers.networks import examples, set_thresholds
from tests.helpers.tiny import BYTES, random_text, randomize, refusal, tiny_config

EVERYTHING = ("attention", "mlp", "experts")
SWIGLU = {"moe__activation": "swiglu", "moe__shared_expert_ratio": 1.0}
# Experts see equal numbers of rows in training, and unequal ones by token choice.
KINDS = {
    "equal rows": {},
    "swiglu and shared expert": SWIGLU,
    "unequal rows": {"moe__type": "token_choice", "moe__top_k": 2},
    "captions": {"model__text": BYTES},
    "wide head": {"model__wide_head": {"width": 20, "depth": 1, "heads": 2}},
}


def lora_config(targets: tuple[str, ...] = EVERYTHING, rank: int = 8, **changes) -> Config:
    return tiny_config(lora={"rank": rank, "alpha": 12.0, "targets": targets}, **changes)


def inputs_of(config: Config) -> tuple:
    x, t, labels = examples(3)
    if config.model.text is None:
        return x, t, labels
    return x, t, random_text(config.model.text, 3, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_network_is_its_base_bit_for_bit(kind: str):
    config = lora_config(**KINDS[kind])
    base = DiT(config.model, config.moe)
    network = DiT(config.model, config.moe, lora=config.lora)
    state = network.state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(state.pop(name), tensor), name
    assert state
    for name, factor in state.items():
        assert is_factor(name)
        assert factor.any() == name.endswith("_lora_a")
    # All that starts with zeros in a DiT would hide what the blocks do.
    randomize(base)
    network.load_state_dict(base.state_dict() | state)
    inputs = inputs_of(config)
    for training in (True, False):
        found = network.train(training)(*inputs).prediction
        assert torch.equal(found, base.train(training)(*inputs).prediction)


def one_by_one(network: DiT, scale: float) -> dict[str, Tensor]:
    """The weights in fp64 that a network with factors stands for, summed number by number."""
    state = {name: one.detach().double() for name, one in network.named_parameters()}
    state |= {name: one.requires_grad_() for name, one in state.items() if is_factor(name)}
    weights = {}
    for name, weight in state.items():
        a, b = (state.get(factor) for factor in factor_names(name))
        if a is None or b is None:
            weights[name] = weight
            continue
        for number in range(a.shape[-1] if weight.dim() == 3 else len(a)):
            if weight.dim() == 3:  # of each expert
                outer = torch.stack(
                    [torch.outer(a[e, :, number], b[e, number]) for e in range(len(weight))]
                )
            else:
                outer = torch.outer(b[:, number], a[number])
            weight = weight + scale * outer
        weights[name] = weight
    return state | {f"merged {name}": weight for name, weight in weights.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_plain_sum_in_fp64(kind: str):
    config = lora_config(**KINDS[kind])
    network = randomize(DiT(config.model, config.moe, lora=config.lora)).train()
    inputs = inputs_of(config)
    output = network(*inputs).prediction
    output.pow(2).mean().backward()

    plain = DiT(config.model, config.moe).double().train()
    told = one_by_one(network, config.lora.scale)
    weights = {name: told[f"merged {name}"] for name, _ in plain.named_parameters()}
    x, t, condition = inputs
    expected = functional_call(plain, weights, (x.double(), t.double(), condition)).prediction
    expected.pow(2).mean().backward()
    # fp32 against fp64; the routing of all tokens is the same, or it would be far off.
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    factors = {name: one for name, one in network.named_parameters() if is_factor(name)}
    assert len(factors) == 2 * len(targeted(network, EVERYTHING))
    for name, factor in factors.items():
        assert factor.grad.any(), name
        distance = (factor.grad.double() - told[name].grad).norm() / told[name].grad.norm()
        assert distance < 1e-4, (name, distance)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_equals_applying(kind: str):
    config = lora_config(**KINDS[kind])
    network = randomize(DiT(config.model, config.moe, lora=config.lora)).eval()
    set_thresholds(network)
    plain = DiT(config.model, config.moe).eval()
    plain.load_state_dict(merged_state(network, config.lora.scale))
    inputs = inputs_of(config)
    applied, found = network(*inputs).prediction, plain(*inputs).prediction
    # To the rounding of fp32: the sums are the same in another order.
    torch.testing.assert_close(found, applied, rtol=1e-5, atol=1e-5)
    before = DiT(config.model, config.moe).eval()
    before.load_state_dict({n: t for n, t in network.state_dict().items() if not is_factor(n)})
    assert (before(*inputs).prediction - applied).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_compiled_block_has_its_factors():
    """On a graph without breaks, which one of the compiler's own could fall out of."""
    config = lora_config(("attention", "mlp"), moe__type="dense")
    network = randomize(DiT(config.model, config.moe, lora=config.lora))
    inputs = inputs_of(config)
    expected = network(*inputs).prediction
    network.blocks[0].compile(backend="eager", fullgraph=True)
    assert torch.equal(network(*inputs).prediction, expected)


def test_targets_are_groups_and_patterns_of_weights():
    for targets, number in (
        (("attention",), 8),
        (("mlp",), 4),  # in blocks 0 and 2
        (("experts",), 4),
        (EVERYTHING, 16),
        (("blocks.?.attention.qkv.weight", "blocks.3.*"), 4 + 1 + 2),
    ):
        config = lora_config(targets, rank=3)
        network = DiT(config.model, config.moe, lora=config.lora)
        assert len([n for n, _ in network.named_parameters() if is_factor(n)]) == 2 * number
    config = lora_config(("experts",), rank=3)
    network = DiT(config.model, config.moe, lora=config.lora)
    trained = {n for n, _ in network.named_parameters()} - frozen_names(network, config.training)
    # 4 experts of 16 to 64 and back, in 2 layers.
    assert network.parameter_count(trained) == 2 * 2 * 4 * 3 * (16 + 64)
    assert (
        network.parameter_count() - network.parameter_count(trained)
        == DiT(config.model, config.moe).parameter_count()
    )


def test_muon_is_not_given_the_factors():
    config = lora_config()
    network = DiT(config.model, config.moe, lora=config.lora)
    assert hidden_matrices(network) == hidden_matrices(DiT(config.model, config.moe))


def test_what_trains_beside_the_factors_is_named():
    config = lora_config(training__train_only=("label_embed.*",), align__block=2)
    network = DiT(config.model, config.moe, align=config.align, lora=config.lora)
    names = {name for name, _ in network.named_parameters()}
    trained = names - frozen_names(network, config.training)
    beside = {name for name in names if name.startswith("projector.")} | {"label_embed.weight"}
    assert trained == beside | set(filter(is_factor, names))
    config = lora_config(training__freeze=("*_lora_a",))
    trained = names - frozen_names(network, config.training)
    assert trained - beside == {name for name in names if name.endswith("_lora_b")}


def test_targets_and_settings_that_cannot_be_meant_are_refused():
    for target, near in (
        ("atention", "did you mean attention?"),
        ("blocks.1.attention.qvk.weight", "did you mean blocks.1.attention.qkv.weight?"),
        ("blocks.1.attention.qkv.bias", "names no weight of attention, MLPs or experts"),
    ):
        config = lora_config((target,))
        with pytest.raises(UserError) as caught:
            DiT(config.model, config.moe, lora=config.lora)
        assert f"lora.targets: {target} names no weight" in str(caught.value)
        assert near in str(caught.value)
    dense = lora_config(("experts",), moe__type="dense")
    with pytest.raises(UserError, match="Groups of this network are attention, mlp, and"):
        DiT(dense.model, dense.moe, lora=dense.lora)
    assert "which is off; set lora.rank" in refusal("lora.alpha=4")
    assert "names nothing; take attention, mlp or experts" in refusal(
        "lora.rank=2", "lora.targets=[]"
    )
