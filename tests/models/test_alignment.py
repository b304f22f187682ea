"""The projector, its targets and its loss: against plain loops, and what they leave alone."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from diffmoe.config import AlignConfig
from diffmoe.models.alignment import Projector, alignment_loss, alignment_targets, is_of_projector
from diffmoe.models.dit import DiT
from tests.helpers.networks import examples, set_thresholds
from tests.helpers.tiny import randomize, tiny_config

GRID, WIDTH, Z = (3, 4), 5, 3


def numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def projected_by_loops(projector: Projector, x_BTD: Tensor) -> Tensor:
    """Token by token, output by output."""
    rows, columns = GRID
    values = dict(projector.named_parameters())

    def layer(name: str, vector: list[Tensor]) -> list[Tensor]:
        weight, bias = values[f"layers.{name}.weight"], values[f"layers.{name}.bias"]
        return [sum(w * v for w, v in zip(row, vector, strict=True)) + b
                for row, b in zip(weight, bias, strict=True)]  # fmt: skip

    outputs = []
    for tokens in x_BTD:
        for y, x in itertools.product(range(rows), range(columns)):
            if "layers.weight" not in values:
                hidden = layer("0", list(tokens[y * columns + x]))
                hidden = layer("2", [h / (1 + torch.exp(-h)) for h in hidden])
                outputs += layer("4", [h / (1 + torch.exp(-h)) for h in hidden])
                continue
            for z in range(Z):
                total = values["layers.bias"][z]
                for dy, dx in itertools.product((-1, 0, 1), repeat=2):
                    if 0 <= y + dy < rows and 0 <= x + dx < columns:
                        token = tokens[(y + dy) * columns + x + dx]
                        weight = values["layers.weight"][z, :, dy + 1, dx + 1]
                        total = total + sum(w * v for w, v in zip(weight, token, strict=True))
                outputs.append(total)
    return torch.stack(outputs).view(len(x_BTD), rows * columns, Z)


def interpolated_by_loops(image: Tensor) -> Tensor:
    """(h, w) on a finer GRID: pixel centers at (i + 1/2) / n, linear between them."""

    def places(here: int, there: int) -> list[tuple[int, int, float]]:
        found = []
        for i in range(here):
            at = min(max((i + 0.5) * there / here - 0.5, 0), there - 1)
            low = math.floor(at)
            found.append((low, min(low + 1, there - 1), at - low))
        return found

    rows = [
        (1 - a) * ((1 - b) * image[y, x] + b * image[y, x2])
        + a * ((1 - b) * image[y2, x] + b * image[y2, x2])
        for y, y2, a in places(GRID[0], image.shape[0])
        for x, x2, b in places(GRID[1], image.shape[1])
    ]
    return torch.stack(rows)


def loss_by_loops(projected_BTZ: Tensor, features_BZhw: Tensor, spatial: bool) -> Tensor:
    cosines = []
    for tokens_TZ, maps_Zhw in zip(projected_BTZ, features_BZhw, strict=True):
        target_ZT = [interpolated_by_loops(one) for one in maps_Zhw]
        if spatial:
            for z, row in enumerate(target_ZT):
                mean = sum(row) / len(row)
                deviation = (sum((v - mean) ** 2 for v in row) / (len(row) - 1)) ** 0.5
                target_ZT[z] = torch.stack([(v - 0.6 * mean) / (deviation + 1e-6) for v in row])
        for t, token in enumerate(tokens_TZ):
            target = [row[t] for row in target_ZT]
            dot = sum(a * b for a, b in zip(token, target, strict=True))
            norms = sum(a * a for a in token) ** 0.5 * sum(b * b for b in target) ** 0.5
            cosines.append(dot / norms)
    return -sum(cosines) / len(cosines)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_loss_and_gradients_equal_a_plain_loop(kind: str):
    align = AlignConfig(block=1, projector=kind, width=Z, hidden=4)
    projector = Projector(align, WIDTH, GRID).double()
    tokens = numbers(2, 12, WIDTH, seed=0).requires_grad_()
    features = numbers(2, Z, 2, 3, seed=1) + 1.5  # of another grid; a mean that can be taken off
    leaves = [tokens, *projector.parameters()]

    loss = alignment_loss(projector(tokens), alignment_targets(features, GRID, kind == "conv"))
    gradients = torch.autograd.grad(loss, leaves)
    expected = loss_by_loops(projected_by_loops(projector, tokens), features, kind == "conv")
    expected_gradients = torch.autograd.grad(expected, leaves)
    assert -1 < expected.item() < 1
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for found, right in zip(gradients, expected_gradients, strict=True):
        assert right.abs().max() > 1e-3
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


def test_the_loss_is_minus_the_cosine_whatever_the_lengths():
    y = numbers(2, 12, Z, seed=0)
    for factor, told in ((3.0, -1.0), (-0.1, 1.0)):
        assert alignment_loss(y * factor, y).item() == pytest.approx(told, abs=1e-12)
    swapped = torch.stack([-y[..., 1], y[..., 0], 0 * y[..., 2]], dim=-1)
    assert alignment_loss(swapped, y).item() == pytest.approx(0, abs=1e-12)


def test_features_of_the_tokens_grid_are_taken_as_they_are():
    features = numbers(2, Z, *GRID, seed=0).half()
    targets = alignment_targets(features, GRID, spatial=False)
    assert targets.dtype == torch.float32
    assert torch.equal(targets[1, 7], features[1, :, 1, 3].float())
    finer = alignment_targets(torch.full((1, Z, 6, 8), 2.0), GRID, spatial=False)
    torch.testing.assert_close(finer, torch.full((1, 12, Z), 2.0))


@pytest.mark.parametrize("family", ["diffmoe", "dense"])
def test_the_projector_changes_nothing_but_the_blocks_up_to_its_own(family: str):
    """Nor does it move another parameter's initial value, or the routing."""
    config = tiny_config(moe__type=family, align={"block": 2, "width": 6, "hidden": 10})
    plain = DiT(config.model, config.moe)
    network = DiT(config.model, config.moe, align=config.align)
    state = network.state_dict()
    own = {name for name in state if is_of_projector(name)}
    assert len(own) == 6
    assert state.keys() - own == plain.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert network.parameter_count() == plain.parameter_count()

    for one in (plain, network):
        randomize(one).train()
        set_thresholds(one)
    batch = examples(3)
    found, expected = network(*batch, True), plain(*batch)
    assert expected.projected is None
    assert network(*batch).projected is None
    assert torch.equal(found.prediction, expected.prediction)
    for layer, before in zip(found.routing, expected.routing, strict=True):
        assert torch.equal(layer.selected_ES, before.selected_ES)

    targets = alignment_targets(torch.randn(3, 6, 4, 4), config.model.grid, spatial=False)
    alignment_loss(found.projected, targets).backward()
    moved = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert own <= moved
    assert {f"blocks.{i}.attention.qkv.weight" for i in (0, 1)} <= moved
    above = ("blocks.2.", "blocks.3.", "final")
    assert not [name for name in moved if name.startswith(above) or "capacity_predictor" in name]
