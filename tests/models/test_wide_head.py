"""The wide head: what it computes, what it leaves alone, and the settings it refuses."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.config import WideHeadConfig
from diffmoe.models.dit import DiT
from diffmoe.models.matrices import hidden_matrices
from tests.helpers.networks import examples
from tests.helpers.tiny import randomize, refusal, tiny_config

HEAD = {"width": 24, "depth": 2, "heads": 3}
# Patches of 2x2 and, on a rectangle, of 1x1; every option that a block of the head has, too.
KINDS = {
    "plain": {},
    "rich": {
        "model__rope": True,
        "model__qk_norm": True,
        "model__mlp_activation": "swiglu",
        "model__input_size": [3, 4],
        "model__patch_size": 1,
        "model__learn_sigma": True,
    },
}


def network_of(**changes) -> DiT:
    config = tiny_config(model__wide_head=HEAD, **changes)
    return randomize(DiT(config.model, config.moe)).train()


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A row times a weight (out, in); biases where there are any."""
    y = weights[f"{name}.weight"] @ x
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def plain_norm(x: Tensor) -> Tensor:
    centered = x - x.mean()
    return centered / (centered.square().mean() + 1e-6).sqrt()


def rms_norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    epsilon = torch.finfo(torch.float32).eps
    return x / (x.square().mean() + epsilon).sqrt() * weights[f"{name}.weight"]


def turned(x: Tensor, place: int, columns: int) -> Tensor:
    """Rotary positions: pairs (i, i + h/2), the first half of them by y, the others by x."""
    half, quarter = len(x) // 2, len(x) // 4
    y = x.clone()
    for i in range(half):
        axis = place // columns if i < quarter else place % columns
        angle = axis * 100.0 ** -((i % quarter) / max(1, quarter - 1))
        cos, sin = math.cos(angle), math.sin(angle)
        y[i] = x[i] * cos - x[i + half] * sin
        y[i + half] = x[i] * sin + x[i + half] * cos
    return y


def block_by_definition(
    weights: dict[str, Tensor], name: str, tokens: list[Tensor], conditions: list[Tensor], kind: str
) -> list[Tensor]:
    """One block on one sample, token by token and head by head."""
    columns, width, heads = 4, HEAD["width"], HEAD["heads"]
    h = width // heads
    parts = [linear(weights, f"{name}.adaln", F.silu(c)).split(width) for c in conditions]
    queries, keys, values = [], [], []
    for place, (x, (shift, scale, *_)) in enumerate(zip(tokens, parts, strict=True)):
        qkv = linear(weights, f"{name}.attention.qkv", plain_norm(x) * (1 + scale) + shift)
        q, k, v = (part.split(h) for part in qkv.split(width))
        if kind == "rich":
            q = [rms_norm(weights, f"{name}.attention.q_norm", one) for one in q]
            k = [rms_norm(weights, f"{name}.attention.k_norm", one) for one in k]
            q, k = ([turned(one, place, columns) for one in all_] for all_ in (q, k))
        queries.append(q)
        keys.append(k)
        values.append(v)
    done = []
    for place, (x, part) in enumerate(zip(tokens, parts, strict=True)):
        mixed = []
        for head in range(heads):
            scores = torch.stack([queries[place][head] @ k[head] / math.sqrt(h) for k in keys])
            share = scores.softmax(0)
            mixed.append(sum(s * v[head] for s, v in zip(share, values, strict=True)))
        x = x + part[2] * linear(weights, f"{name}.attention.proj", torch.cat(mixed))
        hidden = plain_norm(x) * (1 + part[4]) + part[3]
        mlp = f"{name}.feed_forward"
        if kind == "rich":
            gated = F.silu(linear(weights, f"{mlp}.gate", hidden))
            out = linear(weights, f"{mlp}.down", gated * linear(weights, f"{mlp}.up", hidden))
        else:
            gelu = F.gelu(linear(weights, f"{mlp}.fc1", hidden), approximate="tanh")
            out = linear(weights, f"{mlp}.fc2", gelu)
        done.append(x + part[5] * out)
    return done


def by_definition(
    weights: dict[str, Tensor], x: Tensor, backbone_BTD: Tensor, time_BD: Tensor, kind: str
) -> Tensor:
    """The prediction, from the backbone's tokens on."""
    patch, channels = (1, 4) if kind == "rich" else (2, 2)
    B, _, height, width = x.shape
    made = torch.zeros(B, channels, height, width, dtype=torch.float64)
    for b, image in enumerate(x):
        places = [(r, c) for r in range(0, height, patch) for c in range(0, width, patch)]
        embed = weights["wide_head.patch_embed.weight"].flatten(1)
        tokens, conditions = [], []
        for place, (r, c) in enumerate(places):
            square = image[:, r : r + patch, c : c + patch].flatten()
            tokens.append(embed @ square + weights["wide_head.patch_embed.bias"])
            known = F.silu(time_BD[b] + backbone_BTD[b, place])
            conditions.append(linear(weights, "wide_head.project", known))
        for number in range(HEAD["depth"]):
            name = f"wide_head.blocks.{number}"
            tokens = block_by_definition(weights, name, tokens, conditions, kind)
        for (r, c), token, condition in zip(places, tokens, conditions, strict=True):
            shift, scale = linear(weights, "final_adaln", F.silu(condition)).chunk(2)
            square = linear(weights, "final", plain_norm(token) * (1 + scale) + shift)
            square = square.view(patch, patch, channels)
            made[b, :, r : r + patch, c : c + patch] = square.permute(2, 0, 1)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_a_plain_loop_in_fp64(kind: str):
    network, (x, t, labels) = network_of(**KINDS[kind]), examples(2)
    _, height, width = network.config.latent_shape
    x = x[:, :, :height, :width].contiguous()
    seen: list[Tensor] = []
    network.timestep_embed.register_forward_hook(lambda module, given, out: seen.append(out))
    network.blocks[-1].register_forward_hook(lambda module, given, out: seen.append(out[0]))
    output = network(x, t, labels).prediction
    time_BD, backbone_BTD = seen
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    ours = [name for name, _ in network.named_parameters() if name.startswith(("wide", "final"))]
    wanted = [time_BD, backbone_BTD, *(network.get_parameter(name) for name in ours)]
    found = torch.autograd.grad((output * weights).sum(), wanted)

    exact = [one.detach().double().requires_grad_() for one in wanted]
    named = dict(zip(ours, exact[2:], strict=True))
    expected = by_definition(named, x.double(), exact[1], exact[0], kind)
    # fp32 against fp64: sums of about 100 terms.
    torch.testing.assert_close(output.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    # Of the embedding of the timestep this is the head's part alone, so it is left out.
    gradients = torch.autograd.grad((expected * weights).sum(), exact)
    for name, one, other in zip(["backbone", *ours], found[1:], gradients[1:], strict=True):
        assert other.any(), name
        assert (one.double() - other).norm() < 1e-4 * other.norm(), name


def test_off_a_network_is_that_of_before_and_on_its_backbone_is():
    """Initial weights and their sums as numbers are held by test_initialization.py."""
    plain = tiny_config()
    assert plain.model.wide_head is None
    off, on = DiT(plain.model, plain.moe), network_of()
    names = {name for name, _ in off.named_parameters()}
    assert not [name for name in names if "wide_head" in name]
    head = {name for name, _ in on.named_parameters()} - names
    assert head
    assert all(name.startswith("wide_head.") for name in head)
    config = tiny_config(model__wide_head=HEAD)
    made, start = DiT(config.model, config.moe), off.state_dict()
    for name, tensor in made.state_dict().items():
        if name in start and not name.startswith("final"):
            assert torch.equal(tensor, start[name]), name
    # What decides and mixes is the backbone's alone.
    randomize(off).train()
    batch = examples(4)
    for ours, theirs in zip(on(*batch).routing, off(*batch).routing, strict=True):
        assert torch.equal(ours.selected_ES, theirs.selected_ES)
    assert len(on.moe_layers) == len(off.moe_layers)
    assert len(on.feed_forwards) == len(off.feed_forwards) == 4
    assert len(on.all_blocks) == config.model.blocks == 6


def test_a_fresh_network_predicts_zero_and_its_head_starts_as_a_dit_does():
    config = tiny_config(model__wide_head=HEAD)
    network = DiT(config.model, config.moe)
    assert not network(*examples(2)).prediction.any()
    head = network.wide_head
    for name, parameter in head.named_parameters():
        zero = name.endswith("bias") or ".adaln." in name
        assert bool(parameter.any()) != zero, name
    bound = (6 / (16 + 24)) ** 0.5
    assert 0.97 * bound < head.project.weight.abs().max() <= bound


def test_muon_gets_its_matrices_and_no_embedding_of_it():
    network = network_of()
    of_head = {name for name in hidden_matrices(network) if name.startswith("wide_head.")}
    parts = ["attention.qkv", "attention.proj", "feed_forward.fc1", "feed_forward.fc2"]
    assert of_head == {f"wide_head.blocks.{i}.{part}.weight" for i in (0, 1) for part in parts}


def test_products_in_bf16_keep_the_weights_of_its_blocks_in_that_type():
    network = network_of().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network(*examples(2)).prediction
    network.compute_in(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(network(*examples(2)).prediction, expected)
    types = {name: one.dtype for name, one in network.wide_head.named_parameters()}
    assert types["blocks.1.attention.qkv.weight"] == types["blocks.0.adaln.bias"] == torch.bfloat16
    assert types["project.weight"] == types["patch_embed.weight"] == torch.float32


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("width=32", "model.wide_head.width=32 is less than model.width=128"),
        ("heads=7", "model.wide_head.width=2048 is not divisible by model.wide_head.heads=7"),
        ("depth=0", "model.wide_head.depth"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: str, told: str):
    assert told in refusal(f"model.wide_head.{given}", "model.width=128", "model.heads=2")


def test_rotary_positions_need_a_head_width_of_fours():
    told = refusal(
        "model.wide_head.width=132", "model.wide_head.heads=2", "model.rope=true",
        "model.width=128", "model.heads=2",
    )  # fmt: skip
    assert "model.wide_head.width=132 / model.wide_head.heads=2 is 66" in told


def test_by_default_it_is_that_of_rae():
    head = WideHeadConfig()
    assert (head.width, head.depth, head.heads) == (2048, 2, 16)
