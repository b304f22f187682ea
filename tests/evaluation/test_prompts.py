"""What a model is asked for in its evaluation: classes, in turn or drawn, or prompts."""

from dataclasses import replace

import numpy as np
import pytest

from diffmoe.capacity.thresholds import Calibrated, store
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import open_images
from diffmoe.evaluation.models import check_judges, sample_model
from diffmoe.export.open import locate
from diffmoe.sampling.many_images import SampleRequest
from diffmoe.text.prompts import asked, encoder_of
from tests.helpers.models import exported
from tests.helpers.tiny import BYTES, tiny_config

TEXT = tiny_config(model__in_channels=3, model__text=BYTES)
CLASSES = tiny_config(model__in_channels=3)
SETTINGS = SamplingSettings(steps=2)


def sampled(model, out, *captions: str):
    return sample_model(
        locate(model),
        out,
        5,
        SETTINGS,
        prompts_for=lambda config: asked(config, encoder_of(config), captions),
    )


def test_judges_that_do_not_fit_are_refused(tmp_path):
    prompts = asked(TEXT, encoder_of(TEXT), ["red", "blue two"])
    (tmp_path / "truth.json").write_text("[]")
    check_judges(prompts)
    check_judges(None, classifier="digits")
    for asked_for, judges, message in [
        (prompts, {"classifier": "digits"}, "judges classes, and the model takes captions"),
        (None, {"truth": "t.json"}, "truth t.json judges captions, and the model takes classes"),
        (None, {"clip": "models/clip"}, "clip models/clip judges captions"),
        (prompts, {"truth": str(tmp_path / "truth.json")}, "does not tell of 'blue two'"),
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
    with pytest.raises(UserError, match="give at least one prompt"):
        sample_model(locate(model), tmp_path / "none", 5, SETTINGS)


def test_drawn_labels_are_recorded_and_depend_on_seed_and_image_alone(tmp_path):
    model = locate(exported(tmp_path / "model", CLASSES))
    settings = SamplingSettings(steps=1, seed=3)
    balanced = sample_model(model, tmp_path / "out", 40, settings)
    drawn = sample_model(model, tmp_path / "out", 40, settings, labels="random", batch=7)
    other = sample_model(model, tmp_path / "out", 40, replace(settings, seed=4), labels="random")
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
    model, said = locate(exported(tmp_path / "model", CLASSES)), []
    entry = Calibrated(
        weights="ema", capacity=0.8, measured=0.8, common=False, over="trajectory", samples=1,
        sampling=SamplingSettings(steps=2, guidance=2.0), log_odds=[[0.0] * 4] * 2,
    )  # fmt: skip
    store(model, "0.8", entry)
    made = sample_model(model, tmp_path / "out", 3, SETTINGS, capacity=0.8, say=said.append)
    assert made.about["calibration"]["sampling"]["guidance"] == 2.0
    assert "log_odds" not in made.about["calibration"]
    (told,) = said
    met = made.about["capacity_measured"]
    assert told.endswith(f"with guidance 2.0; with guidance 1.0 met capacity {met:.3f}")
