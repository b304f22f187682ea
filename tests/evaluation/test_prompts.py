"""A text model is evaluated on the prompts that it is given."""

import pytest

from diffmoe.conversion.opening import locate
from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import open_images
from diffmoe.evaluation.models import sample_model
from diffmoe.inference.prompts import asked, encoder_of
from diffmoe.inference.sampling import SamplingSettings
from tests.conversion.models import exported
from tests.tiny import BYTES, tiny_config

SETTINGS = SamplingSettings(steps=2)


def sampled(model, out, *captions: str):
    return sample_model(
        locate(model),
        out,
        5,
        SETTINGS,
        prompts_for=lambda config: asked(config, encoder_of(config), captions),
    )


def test_other_prompts_go_to_another_folder(tmp_path):
    model = exported(tmp_path / "model", tiny_config(model__in_channels=3, model__text=BYTES))
    first = sampled(model, tmp_path / "out", "red", "blue two")
    other = sampled(model, tmp_path / "out", "red", "blue one")
    assert first.folder != other.folder
    images = open_images(first.folder)
    assert images.captions() == ["red", "blue two"]
    (part,) = images.parts()
    assert part.labels.tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(UserError, match="give at least one prompt"):
        sample_model(locate(model), tmp_path / "none", 5, SETTINGS)
