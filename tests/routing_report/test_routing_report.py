"""What the report on routing says, against counts made by hand."""

import re
import runpy
import sys

import pytest
import torch

from diffmoe.capacity.thresholds import Calibrated, store
from diffmoe.data.autoencoders import PixelAutoencoder
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.routing_mode import RoutingMode
from diffmoe.routing_report.analysis import BINS, predictor_accuracy, sampling_routing
from diffmoe.routing_report.page import write_page
from diffmoe.sampling.passes import noise_passes
from diffmoe.sampling.sampler import Sampler
from tests.helpers.models import NAMES, exported
from tests.helpers.networks import CONFIG, network_of
from tests.helpers.runs import pack
from tests.helpers.sampling import latents_of
from tests.helpers.tiny import tiny_config

RGB = tiny_config(model__in_channels=3)
LABELS = [0, 1, 2, 3, 4, 0, 1]
SETTINGS = SamplingSettings(steps=3, guidance=1.5, seed=1)


def lively() -> DiT:
    """Every expert takes some tokens."""
    network = network_of(RGB)
    for layer in network.moe_layers:
        layer.capacity_predictor.thresholds.fill_(0.3)
    return network


def report(network, config=RGB, batch: int = 3):
    sampler = Sampler(network, config, PixelAutoencoder())
    return sampling_routing(sampler, LABELS, SETTINGS, batch=batch)


def test_every_figure_equals_a_count_over_all_pairs():
    network = network_of(RGB)
    found = report(network)
    taken = []

    def keep(forward) -> None:
        if not forward.unconditional:
            layers = torch.stack([layer.selected_ES for layer in forward.routing])
            taken.append(layers.unflatten(2, (len(LABELS), -1)).double())

    latents_of(network, RGB, LABELS, range(len(LABELS)), SETTINGS, observe=keep)
    pairs = torch.stack(taken)  # (times, L, E, B, T)
    assert found.capacity.times.tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    same = {"check_dtype": False, "rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.capacity.capacity, 4 * pairs.mean((3, 4)), **same)
    torch.testing.assert_close(found.unselected, (pairs.sum(2) == 0).double().mean((2, 3)), **same)
    torch.testing.assert_close(found.by_sample, pairs.sum(2).mean((0, 1, 3)), **same)
    torch.testing.assert_close(found.compute, pairs.sum(2).mean((0, 1)), **same)
    torch.testing.assert_close(found.places, pairs.mean((0, 3)), **same)
    both = torch.einsum("xlibt,xljbt->lij", pairs, pairs)
    own = pairs.sum((0, 3, 4))
    torch.testing.assert_close(found.overlap, both / own.clamp(min=1)[:, :, None], **same)
    assert found.images.shape == (7, 8, 8, 3)
    by_class = found.by_class()
    assert by_class[1] == pytest.approx(float(found.by_sample[[1, 6]].mean()))
    assert list(by_class.values()) == sorted(by_class.values(), reverse=True)


def test_health_equals_a_count_over_all_pairs_and_modules():
    network = network_of(RGB)
    found = report(network, batch=len(LABELS))
    taken, sizes = [], {}

    def keep(forward) -> None:
        if not forward.unconditional:
            taken.append(torch.stack([layer.selected_ES for layer in forward.routing]).double())

    def size(block, _, output) -> None:
        output = output[0] if isinstance(output, tuple) else output
        sizes.setdefault(block, []).append(output.square().mean().item())

    for block in network.blocks:
        block.feed_forward.register_forward_hook(size)
    latents_of(network, RGB, LABELS, range(len(LABELS)), SETTINGS, observe=keep)
    pairs = torch.stack(taken)  # (times, L, E, S)
    between = pairs.mean(3).var(0, correction=0).sum(1)
    total = pairs.transpose(0, 1).transpose(1, 2).flatten(2).var(2, correction=0).sum(1)
    health = found.health
    assert health["time_share"] == pytest.approx((between / total).tolist(), rel=1e-5)
    assert health["unselected_share"] == pytest.approx(
        (pairs.sum(2) == 0).double().mean((0, 2)).tolist(), rel=1e-5
    )
    root = [(sum(of) / len(of)) ** 0.5 for of in sizes.values()]
    assert health["branch_size"] == pytest.approx(root[1::2], rel=1e-5)
    dense = (root[0] + root[2]) / 2
    assert health["branch_size_over_dense"] == pytest.approx(
        [size / dense for size in root[1::2]], rel=1e-5
    )
    assert all(-1 <= value <= 1 for value in health["expert_output_similarity"])
    assert not any(block.feed_forward._forward_hooks for block in lively().blocks)


def test_shares_stay_shares_where_heun_looks_twice_at_a_time():
    settings = SamplingSettings(steps=3, sampler="heun", seed=1)
    sampler = Sampler(network_of(RGB), RGB, PixelAutoencoder())
    found = sampling_routing(sampler, LABELS, settings)
    assert found.capacity.tokens.tolist() == [112, 224, 224, 112]
    assert (found.unselected <= 1).all()


def test_a_dead_expert_is_found_and_named(tmp_path):
    network = lively()
    assert report(network).dead_experts() == []
    network.moe_layers[1].capacity_predictor.thresholds[2] = 1.0
    found = report(network)
    assert found.dead_experts() == [(1, 2)]
    page = tmp_path / "page.html"
    names = ["plane", "car", "bird", "cat", "<deer>"]
    write_page(page, "A <model>", {"capacity C": "1.0"}, found, None, class_names=names)
    text = page.read_text()
    for label, mean in found.by_class().items():
        name = names[label].replace("<", "&lt;").replace(">", "&gt;")
        assert f"<li>C {mean:.2f}: {name}</li>" in text
    assert "1 of 8 experts are dead" in text
    assert "layer 1, expert 2" in text
    assert "<tr><th>dead experts</th><td>0</td><td>1</td></tr>" in text
    assert "<title>A &lt;model&gt;</title>" in text
    assert len(re.findall(r"<img [^>]*src='data:image/png;base64,", text)) == 6
    assert not re.search(r"(src|href)='?\"?http", text)


@pytest.mark.slow
def test_more_than_ten_classes_show_the_hardest_and_the_easiest(tmp_path):
    many = tiny_config(model__in_channels=3, model__num_classes=12)
    sampler = Sampler(network_of(many), many, PixelAutoencoder())
    found = sampling_routing(sampler, range(12), SETTINGS)
    page = tmp_path / "page.html"
    write_page(page, "Many", {}, found, None)
    assert "The hardest classes" in page.read_text()
    assert "The easiest classes" in page.read_text()
    captions = [f"<{'$' * label}> {label}" for label in range(12)]
    write_page(page, "Many", {}, found, None, captions)
    text = page.read_text()
    hardest, easiest = text.index("The hardest captions"), text.index("The easiest captions")
    told = re.findall(r"<li>C (\d\.\d\d): &lt;\$*&gt; (\d+)</li>", text)
    ordered = [(f"{mean:.2f}", str(label)) for label, mean in found.by_class().items()]
    assert told == ordered[:10] + ordered[:-11:-1]
    assert hardest < text.index("<li>") < easiest < text.rindex("<li>")


def test_the_predictor_is_held_against_the_selection_of_training(tmp_path):
    pack(tmp_path / "data")
    config = CONFIG.replace({"data.path": str(tmp_path / "data")})
    network = network_of(config)
    passes = noise_passes(network, config, 24, 8, seed=3)
    found = predictor_accuracy(network, passes)
    assert {layer.inference for layer in network.moe_layers} == {"per_token"}
    with network.routed(RoutingMode("static", 0.5)):
        predictor_accuracy(network, passes)
        assert [layer.capacity for layer in network.moe_layers] == [0.5, 0.5]

    pairs = []
    network.route_by("static")
    passes.run(lambda forward: pairs.append(forward.routing))
    for number, layer in enumerate(network.moe_layers):
        taken = torch.cat([routing[number].selected_ES.t() for routing in pairs])
        logits = torch.cat([routing[number].capacity_logits_SE for routing in pairs])
        assert taken.sum(0).tolist() == [3 * 8 * 16 // 4] * 4  # K = S / E, in three pools
        wanted = logits.sigmoid() > 0.5
        both = float((wanted & taken).sum())
        assert float(found.precision[number]) == pytest.approx(both / float(wanted.sum()))
        assert float(found.recall[number]) == pytest.approx(both / float(taken.sum()))
        assert layer.capacity_predictor.thresholds.tolist() == [0.5] * 4
    assert found.counts.sum() == 2 * 4 * 24 * 16
    filled = found.counts > 0
    edges = torch.arange(BINS) / BINS
    assert (found.predicted[filled] >= edges[filled]).all()
    assert (found.predicted[filled] <= edges[filled] + 1 / BINS).all()
    share = float((found.selected * found.counts).sum() / found.counts.sum())
    assert share == pytest.approx(1 / 4)  # C = 1


@pytest.mark.slow
def test_the_whole_page_has_the_predictors_figures_too(tmp_path):
    pack(tmp_path / "data", shape=(3, 8, 8))
    config = RGB.replace({"data.path": str(tmp_path / "data")})
    network = lively()
    accuracy = predictor_accuracy(network, noise_passes(network, config, 8, 8, seed=0))
    page = tmp_path / "page.html"
    write_page(page, "Whole", {}, report(network), accuracy)
    assert page.read_text().count("<img ") == 8
    assert "None of the 8 experts is dead" in page.read_text()


def test_a_dense_model_has_no_report():
    config = tiny_config(model__in_channels=3, moe__type="dense")
    with pytest.raises(UserError, match="a dense model routes nothing"):
        report(network_of(config), config)


def test_the_command_reports_on_chosen_classes_of_an_exported_model(tmp_path, monkeypatch, capsys):
    model = exported(tmp_path / "model", RGB, class_names=NAMES)
    entry = Calibrated(
        weights="ema", capacity=0.8, measured=0.8, common=False, over="trajectory", samples=1,
        sampling=SamplingSettings(steps=2, guidance=1.5), log_odds=[[0.0] * 4] * 2,
    )  # fmt: skip
    store(model, "0.8", entry)
    words = ["--classes=deer,1", "--capacity=0.8", "--samples=4", "--steps=2", "--guidance=3"]
    page = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["", str(model), *words, "--out", str(page), "--device=cpu"])
    runpy.run_path("tools/report_routing.py")["main"]()
    told = capsys.readouterr()
    met = re.match(r"capacity ([\d.]+), ", told.out)[1]
    assert f"guidance 1.5; with guidance 3.0 met capacity {met}" in told.err
    assert "4 images, 2 steps, guidance 3.0" in page.read_text()
