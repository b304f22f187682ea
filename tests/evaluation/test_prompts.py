"""A text model is evaluated on the prompts that it is given."""

import pytest

from diffmoe.conversion.opening import locate
from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import open_images
from diffmoe.evaluation.models import check_judges, sample_model
from diffmoe.inference.prompts import asked, encoder_of
from diffmoe.inference.sampling import SamplingSettings
from tests.conversion.models import exported
from tests.tiny import BYTES, tiny_config

TEXT = tiny_config(model__in_channels=3, model__text=BYTES)
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
