"""The compute dial: thresholds that meet a wanted capacity, stored under its name."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from diffmoe.capacity.calibration import EVERY_TOKEN, Passes, calibrate, threshold_of
from diffmoe.capacity.meter import CapacityMeter
from diffmoe.capacity.thresholds import Calibrated, choose_capacity, store, stored
from diffmoe.clock import Clock
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.latent_spec import LatentSpec
from diffmoe.sampling.passes import noise_passes, real_examples, trajectory_passes
from diffmoe.sampling.sampler import Origin, Sampler
from tests.helpers.networks import CONFIG, network_of
from tests.helpers.runs import pack
from tests.helpers.sampling import set_capacity
from tests.helpers.tiny import tiny_config


def taken(values: torch.Tensor, share: float) -> int:
    return int((values > threshold_of(values, share)).sum())


def test_a_threshold_takes_its_share():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    counts = [taken(values, share) for share in (0.0, 0.001, 0.1, 0.25, 0.999, 1.0)]
    assert counts == [0, 1, 100, 250, 999, 1000]


def test_equal_values_are_taken_all_or_none_whichever_is_nearer():
    values = torch.tensor([3.0, 2, 2, 2, 2, 1, 1, 0])
    shares = [k / 8 for k in range(9)]
    assert [taken(values, share) for share in shares] == [0, 1, 1, 1, 5, 5, 5, 7, 8]
    assert taken(torch.zeros(10), 0.4) == 0
    assert taken(torch.zeros(10), 0.6) == 10
    thresholds = [threshold_of(values, share) for share in shares]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[-1] == EVERY_TOKEN


def test_neighboring_numbers_are_told_apart():
    low = torch.tensor(1.0)
    high = torch.nextafter(low, torch.tensor(2.0))  # no number lies between
    assert taken(torch.stack([low, high]), 0.5) == 1


def trajectory(network, config) -> Passes:
    settings = SamplingSettings(steps=6, guidance=1.5)
    return trajectory_passes(Sampler(network, config), [k % 5 for k in range(24)], 12, settings)


def measured(network, passes: Passes) -> torch.Tensor:
    meter = CapacityMeter()
    passes.run(meter)
    return meter.read().by_layer_and_expert


@pytest.mark.parametrize("capacity", [0.1, 0.8, 2.5, 4.0])
def test_a_wanted_capacity_is_met_by_every_expert_on_the_trajectory(capacity: float):
    network = network_of(CONFIG)
    passes = trajectory(network, CONFIG)
    thresholds_LE, met = calibrate(network, capacity, passes)
    by_expert = measured(network, passes)
    assert met == pytest.approx(capacity, rel=0.01)
    assert float(by_expert.mean()) == pytest.approx(met)
    # 24 samples of 16 tokens, 12 evaluations: the shares of single experts are coarse at 0.1.
    torch.testing.assert_close(
        by_expert, torch.full_like(by_expert, capacity), rtol=0.05, atol=0.01
    )
    assert thresholds_LE.shape == (2, 4)


def test_one_common_threshold_meets_it_on_average():
    network = network_of(CONFIG)
    passes = trajectory(network, CONFIG)
    thresholds_LE, met = calibrate(network, 0.8, passes, common=True)
    assert met == pytest.approx(0.8, rel=0.01)
    assert len(thresholds_LE.unique()) == 1
    assert measured(network, passes).std() > 0.05  # experts differ


def test_more_capacity_has_lower_thresholds():
    network = network_of(CONFIG)
    passes = trajectory(network, CONFIG)
    thresholds = [calibrate(network, capacity, passes)[0] for capacity in (0.2, 0.5, 1.0, 2.0)]
    for higher, lower in pairwise(thresholds):
        assert (lower < higher).all()


def test_predictions_that_probabilities_cannot_tell_apart_are_calibrated():
    network = network_of(CONFIG)
    for layer in network.moe_layers:
        layer.capacity_predictor.out.bias.data += 30  # every probability is 1 in fp32
    _, met = calibrate(network, 0.5, trajectory(network, CONFIG))
    assert met == pytest.approx(0.5, rel=0.01)


def test_constant_predictions_are_refused_with_the_reason():
    network = network_of(CONFIG)
    for layer in network.moe_layers:
        layer.capacity_predictor.out.weight.data.zero_()
    with pytest.raises(UserError, match=r"capacity 1\.5 do not settle: 12 rounds end at 0\.0000"):
        calibrate(network, 1.5, trajectory(network, CONFIG))
    _, met = calibrate(network, 4.0, trajectory(network, CONFIG))
    assert met == pytest.approx(4)


@pytest.mark.parametrize("capacity", [0.0, -1.0, 4.1])
def test_a_capacity_that_cannot_be_is_refused(capacity):
    with pytest.raises(UserError, match="above 0, at most 4"):
        calibrate(network_of(CONFIG), capacity, Passes(1, lambda observe: None))


@pytest.mark.parametrize("capacity", [0.3, 1.0, 2.5])
def test_a_race_has_a_dial_as_well(capacity: float):
    config = tiny_config(moe__type="race")
    network = network_of(config)
    passes = trajectory(network, config)
    thresholds_LE, met = calibrate(network, capacity, passes, common=True)
    assert met == pytest.approx(capacity, rel=0.01)
    assert len(thresholds_LE.unique()) == 1
    assert float(measured(network, passes).mean()) == pytest.approx(met)


def test_a_baseline_has_nothing_to_calibrate():
    config = tiny_config(moe__type="token_choice")
    with pytest.raises(UserError, match="a token_choice model has no thresholds"):
        calibrate(network_of(config), 0.5, Passes(1, lambda observe: None))


def test_real_data_at_training_noise_is_met(tmp_path):
    pack(tmp_path / "data")
    config = CONFIG.replace({"data.path": str(tmp_path / "data")})
    network = network_of(config)
    examples = list(real_examples(config, 50, 20, seed=1))
    assert [len(part.t) for part in examples] == [8] * 6 + [2]  # the run's batch is 8
    passes = noise_passes(network, config, 48, 20, seed=1)
    _, met = calibrate(network, 0.7, passes)
    assert met == pytest.approx(0.7, rel=0.01)


ENTRY = Calibrated(
    weights="ema",
    capacity=0.8,
    measured=0.803,
    common=False,
    over="noise",
    samples=10,
    log_odds=[[0.5, -0.25, 1e-8, -1e9], [0.1, 0.2, 0.3, 0.4]],
)


def test_stored_thresholds_come_back_bit_for_bit_under_their_name(tmp_path):
    store(tmp_path, "0.8", ENTRY)
    store(tmp_path, "2", ENTRY.model_copy(update={"capacity": 2.0}))
    assert stored(tmp_path)["0.8"] == ENTRY
    network = network_of(CONFIG)
    set_capacity(network, tmp_path, capacity=0.80)
    for layer, row in zip(network.moe_layers, ENTRY.log_odds, strict=True):
        assert torch.equal(layer.calibrated_E, torch.tensor(row))
        assert not any(name.endswith("log_odds") for name in layer.state_dict())
    set_capacity(network, tmp_path)  # back to those of training
    assert all(layer.calibrated_E is None for layer in network.moe_layers)


def test_a_capacity_that_nobody_calibrated_names_the_command(tmp_path):
    network = network_of(CONFIG)
    with pytest.raises(UserError, match=r"none is calibrated.*calibrate\.py .* --capacity 0\.7"):
        set_capacity(network, tmp_path, capacity=0.7)
    store(tmp_path, "0.8", ENTRY)
    with pytest.raises(UserError, match=r"calibrated are 0\.8"):
        set_capacity(network, tmp_path, capacity=0.7)
    with pytest.raises(UserError, match="live weights"):
        set_capacity(network, tmp_path, capacity=0.8, weights="live")


@pytest.mark.parametrize("text", ["{", "[]", '{"0.8": {"capacity": 1}}', '{"0.8": 3}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "thresholds.json").write_text(text)
    with pytest.raises(UserError, match=r"thresholds\.json is damaged"):
        stored(tmp_path)


def test_thresholds_of_another_network_are_refused(tmp_path):
    entry = ENTRY.model_dump() | {"log_odds": [[0.0] * 3] * 2}
    (tmp_path / "thresholds.json").write_text(json.dumps({"0.8": entry}))
    with pytest.raises(UserError, match=r"2 layers of 3 experts, the model has 2 of 4"):
        set_capacity(network_of(CONFIG), tmp_path, capacity=0.8)


def test_static_routing_takes_its_capacity_without_thresholds(tmp_path):
    network = network_of(CONFIG)
    set_capacity(network, tmp_path, routing="static", capacity=0.5)
    by_expert = measured(network, trajectory(network, CONFIG))
    torch.testing.assert_close(by_expert, torch.full_like(by_expert, 0.5))


def opened(network, folder) -> Sampler:
    """As if it had been opened from a folder."""
    spec, clock = LatentSpec(shape=(2, 8, 8)), Clock(samples=0, step=0, skipped=0)
    return Sampler(network, CONFIG, origin=Origin(folder, "ema", spec, (), clock))


@pytest.mark.parametrize("family", ["expert_choice", "token_choice", "dense"])
def test_a_baseline_has_no_dial_and_records_none(tmp_path, family):
    network = network_of(tiny_config(moe__type=family))
    for name, value in (("routing", "static"), ("routing", "per_token"), ("capacity", 1.0)):
        with pytest.raises(UserError, match=f"a {family} model has no {name} to choose"):
            set_capacity(network, tmp_path, **{name: value})
    (tmp_path / "checksums.json").write_text("{}")
    told = opened(network, tmp_path).with_capacity(None).identity()
    assert (told["routing"], told["capacity"], told["thresholds_sha256"]) == (None, None, None)


def test_what_the_dial_did_is_what_is_recorded(tmp_path):
    (tmp_path / "checksums.json").write_text("{}")
    network = network_of(CONFIG)
    for routing, capacity in ((None, None), ("pooled", None), ("static", 0.5)):
        told = opened(network, tmp_path).with_capacity(capacity, routing).identity()
        assert (told["routing"], told["capacity"]) == (routing or "per_token", capacity)


SAMPLED = SamplingSettings(sampler="heun", steps=20, guidance=2.0, guidance_interval=(0.2, 0.9))


def test_a_calibration_says_what_it_was_made_with(tmp_path):
    entry = ENTRY.model_copy(update={"over": "trajectory", "sampling": SAMPLED, "labels": "random"})
    store(tmp_path, "0.8", entry)
    written = json.loads((tmp_path / "thresholds.json").read_text())["0.8"]
    told = {name: written["sampling"][name] for name in ("sampler", "steps", "guidance")}
    assert told == {"sampler": "heun", "steps": 20, "guidance": 2.0}
    assert written["labels"] == "random"
    network = network_of(CONFIG)
    chosen = [
        choose_capacity(network, tmp_path, *words) for words in ((None, 0.8), (), ("static", 0.8))
    ]
    assert [choice.calibrated for choice in chosen] == [entry, None, None]
    assert entry == stored(tmp_path)["0.8"]


def test_sampling_otherwise_than_calibrated_tells_the_capacity_met():
    entry = ENTRY.model_copy(update={"over": "trajectory", "sampling": SAMPLED})
    assert entry.differs(replace(SAMPLED, seed=9), CONFIG, 0.8) is None
    other = replace(SAMPLED, guidance=4.0, guidance_interval=(0.0, 1.0))
    assert entry.differs(other, CONFIG, 1.0321) == (
        "the thresholds of capacity 0.8 were calibrated with guidance 2.0, guidance interval "
        "0.2,0.9; with guidance 4.0, guidance interval 0,1 met capacity 1.032"
    )
    usual = ENTRY.model_copy(update={"sampling": SamplingSettings(steps=50, guidance=1.5)})
    assert usual.differs(SamplingSettings("euler", 50, 1.5), CONFIG, 0.8) is None  # its default
    on_data = ENTRY.differs(SAMPLED, CONFIG, 0.9)
    assert on_data.endswith("the noise levels of training; these samples met capacity 0.900")


def test_calibrations_of_before_are_read_with_what_their_words_say(tmp_path):
    old = ENTRY.model_dump(exclude={"sampling", "labels"})
    files = {"0.8": old | {"over": "trajectory: 50 steps, guidance 2.5"}, "0.5": old}
    (tmp_path / "thresholds.json").write_text(json.dumps(files))
    entries = stored(tmp_path)
    assert entries["0.5"] == ENTRY
    assert entries["0.8"].sampling == SamplingSettings(steps=50, guidance=2.5)
    assert entries["0.8"].log_odds == ENTRY.log_odds
    told = entries["0.8"].differs(SamplingSettings(steps=50, guidance=1.5), CONFIG, 0.7)
    assert "calibrated with guidance 2.5; with guidance 1.5 met capacity 0.700" in told
