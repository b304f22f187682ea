"""ProMoE against closed forms."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.models.families.promoe import contrastive_loss
from diffmoe.models.moe import MoEFeedForward
from tests.helpers.families import layer_of, network_of, tokens
from tests.helpers.networks import WIDTH, examples, one_after_the_other

NULL_B = torch.tensor([False, True, False])
LABELS = torch.tensor([0, 5, 3])  # of which 5 is the null label


def routed_alone(layer: MoEFeedForward, x: Tensor, null: bool) -> Tensor:
    return layer(x, None, None, torch.full((len(x),), null))[0]


def test_tokens_without_a_condition_see_an_expert_of_their_own():
    layer = layer_of("promoe", moe__shared_expert_ratio=1.0)
    x = tokens()
    mixed = layer(x, None, None, NULL_B)[0]
    for part, null in ((0, False), (1, True), (2, False)):
        alone = routed_alone(layer, x[part : part + 1], null)
        torch.testing.assert_close(mixed[part : part + 1], alone, atol=1e-13, rtol=0)
    flat = x.flatten(0, 1)
    expected = layer.unconditional_expert(flat) + layer.shared_expert(flat)
    torch.testing.assert_close(
        routed_alone(layer, x, True).flatten(0, 1), expected, atol=1e-13, rtol=0
    )


@pytest.mark.parametrize("null", [True, False])
def test_gradients_of_what_no_token_sees_are_zero(null: bool):
    layer = layer_of("promoe").train()
    y, routed = layer(tokens(), None, None, torch.full((3,), null))
    (y.sin().sum() + sum(routed.losses.values())).backward()
    unconditional = [p.grad for p in layer.unconditional_expert.parameters()]
    experts = [layer.router.grad, *(p.grad for p in layer.experts.parameters())]
    unseen, seen = (experts, unconditional) if null else (unconditional, experts)
    assert all(gradient is None or (gradient == 0).all() for gradient in unseen)
    assert all(gradient.count_nonzero() > 0 for gradient in seen)
    assert all(gradient.isfinite().all() for gradient in [*seen, *unseen] if gradient is not None)


def test_a_token_along_a_prototype_has_a_gate_of_one():
    layer = layer_of("promoe")
    along = 3.7 * layer.router.detach()[2]
    y, _ = layer(along.view(1, 1, WIDTH))
    expected = one_after_the_other(layer.experts, along[None], [0, 0, 1, 0])
    torch.testing.assert_close(y[0], expected, atol=1e-12, rtol=0)
    alone = layer_of("promoe", moe__experts=1)
    opposite = -2.0 * alone.router.detach()
    expected = -one_after_the_other(alone.experts, opposite, [1])
    torch.testing.assert_close(alone(opposite[None])[0][0], expected, atol=1e-12, rtol=0)


def test_the_network_tells_which_samples_have_no_condition():
    network = network_of("promoe").eval()
    x, t, _ = examples(3)
    with torch.no_grad():
        routed = network(x, t, LABELS).routing[0]
    per_sample = routed.selected_ES.sum(dim=0).view(3, 16)
    assert per_sample.sum(dim=1).tolist() == [16, 0, 16]


@pytest.mark.parametrize("temperature", [0.07, 0.1])
def test_the_contrastive_loss_has_its_closed_forms(temperature: float):
    E = 12
    prototypes = torch.eye(E, WIDTH, dtype=torch.float64)
    every = torch.eye(E, dtype=torch.bool)
    expected = math.log(1 + (E - 1) * math.exp(-1 / temperature))
    found = contrastive_loss(prototypes * 5, prototypes * 0.1, every, temperature).item()
    assert found == pytest.approx(expected, rel=1e-6)
    same = torch.ones(E, WIDTH, dtype=torch.float64)
    for active in (2, 7, 12):
        selected_ES = every & (torch.arange(E) < active)[:, None]
        found = contrastive_loss(same, prototypes, selected_ES, temperature).item()
        assert found == pytest.approx(math.log(active))
    for active in (0, 1):
        selected_ES = every & (torch.arange(E) < active)[:, None]
        assert contrastive_loss(prototypes, same, selected_ES, temperature).item() == 0


def test_the_contrastive_loss_has_its_gradient_and_leaves_idle_prototypes_alone():
    """Of z = cosine / temperature: (softmax of the row - one-hot) / number of active experts."""
    tau, generator = 0.2, torch.Generator().manual_seed(0)
    flat = torch.randn(9, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    prototypes = torch.randn(4, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    owner_S = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3])
    selected_ES = F.one_hot(owner_S, 4).t().bool()
    found = torch.autograd.grad(
        contrastive_loss(flat, prototypes, selected_ES, tau), [flat, prototypes]
    )
    active = [0, 1, 3]
    means = torch.stack([flat[owner_S == i].mean(dim=0) for i in active])
    z = F.cosine_similarity(prototypes[active][:, None], means[None], dim=2) / tau
    upstream = ((z.softmax(dim=1) - torch.eye(3)) / 3).detach()
    expected = torch.autograd.grad(z, [flat, prototypes], upstream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-10)
    assert (found[1][2] == 0).all()
