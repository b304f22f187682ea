"""The held-out loss: fixed samples, noise and times; the same however it is shared out."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.evaluation import held_out
from diffmoe.evaluation.held_out import BINS, HeldOut, training_routing
from diffmoe.tree import tree_cat
from tests.helpers.networks import network_of
from tests.helpers.runs import pack
from tests.helpers.tiny import tiny_config

SAMPLES = 30  # of 36; with batches of 8 the last one has 6


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(held_out, "BATCH", 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(pack(tmp_path_factory.mktemp("held-out") / "data"))


class Oracle(nn.Module):
    """Predicts the target but for an error that depends on the time; knows data and noise."""

    def __init__(self, of: HeldOut, error) -> None:
        super().__init__()
        self.positions, self.error = torch.zeros(1), error
        self.by_t = {}
        for number in of.mine:
            part = of.examples(number)
            rows = zip(part.t.tolist(), part.data, part.noise, strict=True)
            self.by_t |= {t: (data, noise) for t, data, noise in rows}

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> SimpleNamespace:
        rows = [data - noise + self.error(time) for time, (data, noise) in self._of(t)]
        return SimpleNamespace(prediction=torch.stack(rows), routing=[])

    def _of(self, t: Tensor):
        return [(time, self.by_t[time]) for time in t.tolist()]


def test_the_mean_and_the_bins_of_time_are_those_of_the_errors(folder: str):
    of = HeldOut(tiny_config(), folder, SAMPLES)
    measured = of.measure(Oracle(of, lambda t: 2 * t))
    found = of.summary(measured)
    grid = (torch.arange(SAMPLES) + 0.5) / SAMPLES
    assert found.loss == pytest.approx((2 * grid).square().mean().item(), rel=1e-5)
    each = (2 * grid).square().view(BINS, -1).mean(dim=1)
    assert found.by_time == pytest.approx(each.tolist(), rel=1e-5)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_every_sample_comes_once_at_a_time_of_its_own(folder: str, objective: str):
    config = tiny_config(diffusion__objective=objective, model__learn_sigma=objective == "ddpm")
    of = HeldOut(config, folder, SAMPLES)
    parts = [of.examples(number) for number in of.mine]
    data = torch.cat([part.data for part in parts])
    assert len(torch.unique(data.flatten(1), dim=0)) == SAMPLES
    noise = torch.cat([part.noise for part in parts])
    assert len(torch.unique(noise.flatten(1), dim=0)) == SAMPLES
    t = torch.cat([part.t for part in parts]).sort().values
    if objective == "flow":
        assert torch.equal(t, (torch.arange(SAMPLES) + 0.5) / SAMPLES)
    else:  # 1,000 steps in 30 equal parts, the middle of each
        middle = (torch.arange(SAMPLES) + 0.5) / SAMPLES * 1000
        assert (t - middle).abs().max() <= 1
    again = [HeldOut(config, folder, SAMPLES).examples(number) for number in of.mine]
    assert all(torch.equal(a.x_t, b.x_t) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe__type": "expert_choice"},
        {"moe__type": "dense"},
        {"diffusion__objective": "ddpm", "model__learn_sigma": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("static", [False, True])
def test_shares_of_two_ranks_add_up_to_the_whole_bit_for_bit(
    folder: str, changes: dict, static: bool
):
    config = tiny_config(**changes)
    network = network_of(config)
    mode = training_routing(network) if static else network.routing
    if mode is not None:
        network.routing = mode
    whole = HeldOut(config, folder, SAMPLES)
    expected = whole.measure(network)
    assert (expected[0] > 0).all()
    assert (expected[1] > 0).any() == (config.moe.type != "dense")
    parts = [HeldOut(config, folder, SAMPLES, mine=mine) for mine in (range(2), range(2, 4))]
    assert torch.equal(sum(part.measure(network) for part in parts), expected)


def test_losses_are_those_of_the_objective_on_all_samples_at_once(folder: str):
    """With routing per token a sample's loss does not depend on its batch."""
    config = tiny_config()
    network = network_of(config)
    of = HeldOut(config, folder, SAMPLES)
    every = tree_cat([of.examples(number) for number in of.mine])
    with torch.no_grad():
        prediction, routed, _ = network(*every.inputs)
    expected_N = (prediction - (every.data - every.noise)).square().flatten(1).mean(dim=1)
    found_N, experts_N = of.measure(network)
    torch.testing.assert_close(found_N, expected_N.double(), rtol=1e-6, atol=0)
    pairs = sum(layer.selected_ES.sum() for layer in routed).item()
    tokens = sum(layer.selected_ES.shape[1] for layer in routed)
    assert experts_N.mean().item() == pytest.approx(pairs / tokens, rel=1e-9)


def test_too_few_samples_are_named(folder: str):
    with pytest.raises(UserError, match=r"validation\.samples=37: .* holds 36"):
        HeldOut(tiny_config(), folder, 37)


def test_data_of_another_shape_is_refused(folder: str):
    config: Config = tiny_config(model__in_channels=3)
    with pytest.raises(UserError, match="in_channels"):
        HeldOut(config, folder, 8)
