"""Networks that are conditioned on captions: what a caption changes, and what it leaves alone."""

import pytest
import torch
from torch import Tensor

from diffmoe.conditions import Text, unconditional
from diffmoe.config import Config
from diffmoe.models.dit import DiT
from diffmoe.models.moe import routing_loss
from diffmoe.tree import tree_map
from tests.helpers.tiny import BYTES, FROZEN, WITHOUT_POOLED, random_text, randomize, tiny_config

KINDS = pytest.mark.parametrize("text", [BYTES, FROZEN, WITHOUT_POOLED], ids=str)


def config_of(text: dict, **changes) -> Config:
    return tiny_config(model__text=text, **changes)


def network_of(text: dict, **changes) -> DiT:
    config = config_of(text, **changes)
    return randomize(DiT(config.model, config.moe)).eval()


def inputs(text: dict, samples: int, seed: int = 0) -> tuple[Tensor, Tensor, Text]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(samples, 2, 8, 8, generator=generator),
        torch.rand(samples, generator=generator),
        random_text(config_of(text).model.text, samples, generator),
    )


def without_caption(text: Text) -> Text:
    return text._replace(mask_BL=torch.zeros_like(text.mask_BL))


@KINDS
def test_a_text_model_starts_as_one_without_text(text: dict):
    """Nothing that captions add is seen before the first step, wherever else weights are."""
    config = config_of(text)
    network = DiT(config.model, config.moe).initialize(0)
    for name, parameter in network.named_parameters():
        if ".adaln." in name or name.startswith("final"):  # their zeros would hide all else
            torch.nn.init.normal_(parameter, std=0.3)
    x, t, captions = inputs(text, 4)
    expected = network(x, t, without_caption(captions)).prediction
    assert expected.abs().max() > 0.1
    for seed in (1, 2):
        other = inputs(text, 4, seed)[2]
        assert torch.equal(network(x, t, other).prediction, expected)


def test_bytes_and_places_start_at_the_scale_of_what_blocks_add():
    config = config_of({"encoder": "bytes", "length": 64, "width": 64, "depth": 1})
    embed = DiT(config.model, config.moe).initialize(0).text_embed
    for one, std in (
        (embed.encoder.embed.weight, 1.0),
        (embed.encoder.places, 1.0),
        (embed.null_token, 0.02),
    ):
        assert one.std().item() == pytest.approx(std, rel=4 * one.numel() ** -0.5)


@KINDS
def test_what_lies_behind_a_caption_changes_no_bit(text: dict):
    network = network_of(text)
    x, t, captions = inputs(text, 4)
    assert not captions.mask_BL.all()
    other = inputs(text, 4, seed=1)[2].tokens
    places = captions.mask_BL if text["encoder"] == "bytes" else captions.mask_BL[..., None]
    tokens = torch.where(places, captions.tokens, other)
    assert not torch.equal(tokens, captions.tokens)
    a = network(x, t, captions).prediction
    b = network(x, t, captions._replace(tokens=tokens)).prediction
    assert torch.equal(a, b)


@KINDS
def test_swapped_captions_swap_what_they_do(text: dict):
    network = network_of(text)
    x, t, captions = inputs(text, 2)
    x, t = x[:1].expand(2, -1, -1, -1), t[:1].expand(2)
    swapped = tree_map(lambda tensor: tensor.flip(0), captions)
    a, b = network(x, t, captions).prediction, network(x, t, swapped).prediction
    assert (a[0] - a[1]).abs().max() > 1e-3
    torch.testing.assert_close(b, a.flip(0), atol=1e-6, rtol=0)


@KINDS
def test_every_token_of_a_caption_counts(text: dict):
    network = network_of(text)
    x, t, captions = inputs(text, 1)
    captions = captions._replace(mask_BL=torch.ones_like(captions.mask_BL))
    expected = network(x, t, captions).prediction
    for place in range(text["length"]):
        mask_BL = captions.mask_BL.clone()
        mask_BL[0, place] = False
        changed = network(x, t, captions._replace(mask_BL=mask_BL)).prediction
        assert (changed - expected).abs().max() > 1e-5, place


@pytest.mark.parametrize("inference", ["per_token", "pooled", "static"])
def test_the_pool_holds_image_tokens_alone(inference: str):
    network = network_of(BYTES)
    network.route_by(inference)
    for mode in (network.train(), network.eval()):
        routing = mode(*inputs(BYTES, 3)).routing
        assert [layer.selected_ES.shape for layer in routing] == [(4, 3 * 16)] * 2
        assert [len(layer.capacity_logits_SE) for layer in routing] == [3 * 16] * 2


@KINDS
def test_without_a_caption_learned_ones_stand_in_for_it(text: dict):
    network = network_of(text).train()
    x, t, captions = inputs(text, 3)
    none = without_caption(captions)
    prediction = network(x, t, none).prediction
    # Whatever the null caption's tokens and pooled vector hold, they are not looked at.
    other = without_caption(inputs(text, 3, seed=1)[2])
    assert torch.equal(network(x, t, other).prediction, prediction)
    learned = {n: p for n, p in network.named_parameters() if n.startswith("text_embed.null")}
    assert len(learned) == (1 if text is WITHOUT_POOLED else 2)
    for parameter in learned.values():
        with torch.no_grad():
            parameter += 1
        changed = network(x, t, none).prediction
        assert (changed - prediction).abs().max() > 1e-3
        with torch.no_grad():
            parameter -= 1


@KINDS
def test_dropping_some_captions_leaves_the_others_alone(text: dict):
    network = network_of(text)
    x, t, captions = inputs(text, 4)
    where_B = torch.tensor([False, True, False, True])
    mixed = network(x, t, unconditional(captions, where_B, 5)).prediction
    for rows, condition in ((~where_B, captions), (where_B, without_caption(captions))):
        whole = network(x, t, condition).prediction
        torch.testing.assert_close(mixed[rows], whole[rows], atol=1e-6, rtol=0)


@KINDS
def test_every_parameter_learns_and_recomputation_changes_no_bit(text: dict):
    told = []
    for active in (False, True):
        network = network_of(text, model__qk_norm=True).train()
        network.checkpoint_activations(active)
        x, t, captions = inputs(text, 4)
        captions = unconditional(captions, torch.tensor([True, False, False, False]), 5)
        output = network(x, t, captions)
        loss = output.prediction.square().mean() + routing_loss(output.routing, network.moe_config)
        loss.backward()
        gradients = {name: p.grad for name, p in network.named_parameters()}
        for name, gradient in gradients.items():
            assert gradient.isfinite().all(), name
            assert gradient.count_nonzero() > 0, name
        told.append(gradients)
    for name, gradient in told[0].items():
        assert torch.equal(gradient, told[1][name]), name


@KINDS
def test_a_text_model_evaluates_no_samples(text: dict):
    assert network_of(text)(*inputs(text, 0)).prediction.shape == (0, 2, 8, 8)


def test_a_text_model_has_no_labels_and_a_class_model_no_text():
    with_text, with_classes = network_of(BYTES), DiT(tiny_config().model, tiny_config().moe)
    assert not any("label" in name for name, _ in with_text.named_parameters())
    names = [name for name, _ in with_classes.named_parameters()]
    assert not any("text" in name or "cross" in name for name in names)
    assert "label_embed.weight" in names
