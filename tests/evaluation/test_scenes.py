"""Digits, colors and places are read from pictures, real ones almost without a mistake."""

import json

import numpy as np
import pytest

from diffmoe.digits import digit_network
from diffmoe.digits.captioned_digits import COLORS, Digits, Scene, all_scenes, halves
from diffmoe.errors import UserError
from diffmoe.evaluation import results
from diffmoe.evaluation.image_sets import open_images
from diffmoe.evaluation.scenes import SceneReader, load_truth, real_accuracy, scene_accuracy
from tests.helpers.pictures import write_samples

SCENES = all_scenes()[:: len(all_scenes()) // 40][:40]
CAPTIONS = [scene.captions()[k % 2] for k, scene in enumerate(SCENES)]


@pytest.fixture(scope="module")
def reader():
    """Fitted for a fifth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_network, "EPOCHS", 6)
        yield SceneReader()


@pytest.fixture
def truth(tmp_path):
    file = tmp_path / "unseen.json"
    entries = [
        {"prompt": caption, **scene._asdict()}
        for caption, scene in zip(CAPTIONS, SCENES, strict=True)
    ]
    file.write_text(json.dumps(entries))
    return load_truth(file)


def canvases(scenes=SCENES):
    digits, rng = Digits(held_out=True), np.random.default_rng(1)
    return np.stack([digits.draw(scene, rng) for scene in scenes])


def samples(folder, images):
    """An image of each caption, in turn."""
    return open_images(write_samples(folder, images, classes=len(CAPTIONS), captions=CAPTIONS))


def test_truth_comes_back(truth):
    assert truth == dict(zip(CAPTIONS, SCENES, strict=True))


@pytest.mark.parametrize(
    ("field", "value"), [("relation", "beside"), ("colors", ["red"]), ("digits", [1, 10])]
)
def test_a_truth_of_scenes_that_cannot_be_is_refused(field, value, tmp_path):
    entry = {"prompt": CAPTIONS[0], **SCENES[0]._asdict()} | {field: value}
    (tmp_path / "unseen.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=r"there is no .*; give the unseen\.json"):
        load_truth(tmp_path / "unseen.json")


@pytest.mark.slow
def test_real_scenes_are_read(reader, truth, tmp_path):
    found = scene_accuracy(samples(tmp_path / "samples", canvases()), truth, reader)
    assert found["colors"] == 1.0
    assert found["digits"] > 0.9
    real = real_accuracy(truth, reader)
    assert real["colors"] == 1.0
    assert real["scenes"] <= real["digits"]
    assert real["digits"] > 0.93


def test_wrong_pictures_are_not_right(reader, truth, tmp_path):
    """Things that have changed places, and another color: only what is wrong counts as wrong."""
    first = SCENES[0]
    red_left = Scene("left of", ("red", "blue"), (1, 0))
    (canvas,) = canvases([red_left])
    assert reader(canvas[None], ["left of"])[0] == red_left
    mirrored = np.concatenate([canvas[:, 16:], canvas[:, :16]], axis=1)
    assert reader(mirrored[None], ["left of"])[0] == Scene("left of", ("blue", "red"), (0, 1))
    # Of things side by side, nothing above another can be read.
    assert reader(canvas[None], ["above"])[0].colors != ("red", "blue")

    swapped = canvases()[..., ::-1]  # red and blue, yellow and cyan have changed
    kept = np.mean([[c in ("green", "magenta") for c in scene.colors] for scene in SCENES])
    found = scene_accuracy(samples(tmp_path / "swapped", swapped), truth, reader)
    assert found["colors"] == pytest.approx(kept)
    assert found["digits"] > 0.9
    assert found["scenes"] <= kept
    assert first.colors == ("red", "red")


def test_black_pictures_are_wrong(reader, truth, tmp_path):
    images = np.zeros((40, 32, 32, 3), np.uint8)
    assert scene_accuracy(samples(tmp_path / "black", images), truth, reader)["scenes"] <= 0.05


def test_halves_are_where_the_digits_stand():
    digits, rng = Digits(), np.random.default_rng(0)
    for scene in SCENES:
        canvas = digits.draw(scene, rng)
        for place, color in zip(halves(canvas[None], scene.relation), scene.colors, strict=True):
            pixel = place[0].reshape(-1, 3)[place[0].max(-1).argmax()]
            assert tuple(pixel > 0) == tuple(np.array(COLORS[color]) > 0)


def test_the_result_tells_how_well_real_ones_are_read(reader, truth, tmp_path):
    images = samples(tmp_path / "samples", canvases())
    result = results.measure_scenes(images, truth, reader)
    metrics = result["metrics"]
    assert metrics["of real ones, colors right"] == 1.0
    assert 0.8 < metrics["scenes right"] <= 1.0
    if metrics["of real ones, scenes right"] < 0.97:
        assert "the classifiers themselves read" in result["warnings"][0]


def test_other_pictures_and_files_are_refused(reader, truth, tmp_path):
    small = samples(tmp_path / "small", np.zeros((40, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="is not a canvas of the scenes"):
        scene_accuracy(small, truth, reader)
    some = dict(list(truth.items())[1:])
    with pytest.raises(UserError, match="has no 'a red zero"):
        scene_accuracy(samples(tmp_path / "a", canvases()), some, reader)
    (tmp_path / "no.json").write_text("[1]")
    with pytest.raises(UserError, match="give the unseen"):
        load_truth(tmp_path / "no.json")
