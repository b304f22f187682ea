"""What a model is asked for in its evaluation: classes, in turn or drawn, or prompts."""

from dataclasses import replace

import numpy as np
import pytest

from diffmoe.capacity.thresholds import Calibrated, store
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import open_images
from diffmoe.evaluation.models import check_judges, sample_model
from diffmoe.sampling.many_images import SampleRequest
from diffmoe.sampling.sampler import Sampler
from diffmoe.text.prompts import create_prompts, encoder_of
from tests.helpers.models import exported
from tests.helpers.tiny import BYTES, tiny_config

TEXT = tiny_config(model__in_channels=3, model__text=BYTES)
CLASSES = tiny_config(model__in_channels=3)
SETTINGS = SamplingSettings(steps=2)


def sampled(model, out, *captions: str):
    sampler = Sampler.open(model)
    prompts = create_prompts(TEXT, encoder_of(TEXT), captions)
    sampler = replace(sampler, prompts=prompts)
    return sample_model(sampler, out, sampler.request(5), SETTINGS)


def test_judges_that_do_not_fit_are_refused(tmp_path):
    prompts = create_prompts(TEXT, encoder_of(TEXT), ["red", "blue two"])
    (tmp_path / "truth.json").write_text("[]")
    check_judges(prompts)
    check_judges(None, classifier="digits")
    for asked_for, judges, message in [
        (prompts, {"classifier": "digits"}, "judges classes, and the model takes captions"),
        (None, {"truth": "t.json"}, "truth t.json judges captions, and the model takes classes"),
        (None, {"clip": "models/clip"}, "clip models/clip judges captions"),
        (prompts, {"truth": str(tmp_path / "truth.json")}, "does not contain 'blue two'"),
    ]:
        with pytest.raises(UserError, match=message):
            check_judges(asked_for, **judges)


def test_other_prompts_go_to_another_folder(tmp_path):
    model = exported(tmp_path / "model", TEXT)
    first = sampled(model, tmp_path / "out", "red", "blue two")
    other = sampled(model, tmp_path / "out", "red", "blue one")
    assert first.folder != other.folder
    images = open_images(first.folder)
    assert images.captions() == ["red", "blue two"]
    (part,) = images.parts()
    assert part.labels.tolist() == [0, 1, 0, 1, 0]
    unprompted = Sampler.open(model)
    with pytest.raises(UserError, match="give at least one prompt"):
        sample_model(unprompted, tmp_path / "none", unprompted.request(5), SETTINGS)


def test_drawn_labels_are_recorded_and_depend_on_seed_and_image_alone(tmp_path):
    sampler, out = Sampler.open(exported(tmp_path / "model", CLASSES)), tmp_path / "out"
    settings = SamplingSettings(steps=1, seed=3)
    in_turn, random = sampler.request(40), sampler.request(40, "random")
    balanced = sample_model(sampler, out, in_turn, settings)
    drawn = sample_model(sampler, out, random, settings, batch=7)
    other = sample_model(sampler, out, random, replace(settings, seed=4))
    assert len({balanced.folder, drawn.folder, other.folder}) == 3
    found = {}
    for kind, made in (("balanced", balanced), ("drawn", drawn), ("other", other)):
        images = open_images(made.folder)
        assert images.about["labels"] == ("balanced" if kind == "balanced" else "random")
        found[kind] = np.concatenate([part.labels for part in images.parts()]).tolist()
    assert found["balanced"] == [k % 5 for k in range(40)]
    order = SampleRequest(40, (0, 1, 2, 3, 4), "random")
    assert found["drawn"] == [order.label(k, 3) for k in range(40)]
    assert len({*found["drawn"]}) == 5
    assert found["drawn"] != found["other"]


def test_what_a_calibration_was_made_with_goes_into_the_result(tmp_path):
    model, said = exported(tmp_path / "model", CLASSES), []
    entry = Calibrated(
        weights="ema", capacity=0.8, measured=0.8, common=False, over="trajectory", samples=1,
        sampling=SamplingSettings(steps=2, guidance=2.0), log_odds=[[0.0] * 4] * 2,
    )  # fmt: skip
    store(model, "0.8", entry)
    sampler = Sampler.open(model).with_capacity(0.8)
    request = sampler.request(3)
    made = sample_model(sampler, tmp_path / "out", request, SETTINGS, say=said.append)
    assert made.about["calibration"]["sampling"]["guidance"] == 2.0
    assert "log_odds" not in made.about["calibration"]
    (told,) = said
    met = made.about["capacity_measured"]
    assert told.endswith(f"with guidance 2.0; with guidance 1.0 met capacity {met:.3f}")
