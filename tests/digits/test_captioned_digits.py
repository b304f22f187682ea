"""The captions are true of the pixels, and what is held out occurs nowhere."""

import json

import numpy as np
import pytest

from diffmoe.data.fetching import open_shard
from diffmoe.data.manifest import Manifest
from diffmoe.data.reading import OpenShard
from diffmoe.digits.captioned_digits import COLORS, NUMERALS, all_scenes, pack_captioned_digits
from diffmoe.errors import UserError
from diffmoe.prepare.checking import check_data
from tests.helpers.shards import members

IMAGES, UNSEEN = 400, 7000  # of 7,200 scenes: nearly all are held out, so chance cannot hide


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("captioned")
    pack_captioned_digits(directory, 4, images=IMAGES, unseen=UNSEEN)
    return directory


def samples(directory):
    """Canvases (32,32,3) as whole numbers of pixels, with their captions."""
    manifest = Manifest.load(directory)
    for shard in manifest.shards:
        address = manifest.address(directory, shard)
        opened = OpenShard(open_shard(address, shard, attempts=1), shard, manifest, address)
        for index in range(len(opened)):
            pixels = opened.array(index)
            yield pixels.transpose(1, 2, 0), opened.captions(index).lines
        opened.close()


def color_of(pixels: np.ndarray) -> str:
    """By the brightest pixel: which channels are lit."""
    lit = pixels.reshape(-1, 3)[pixels.max(-1).argmax()] > 20
    (name,) = [
        name for name, value in COLORS.items() if (np.array(value) > 0).tolist() == lit.tolist()
    ]
    return name


def words_of(caption: str) -> tuple[str, str, str, str, str]:
    """Color, numeral, relation, color, numeral."""
    first, second = caption.removeprefix("a ").split(" a ")
    color, numeral, relation = first.split(" ", 2)
    return (color, numeral, relation, *second.split())


@pytest.mark.slow
def test_captions_are_true_of_the_pixels(packed):
    """Read by place: an image that is lit in the left third only shows its left thing there."""
    for pixels, lines in samples(packed):
        (one, a, relation, two, b), other = (words_of(line) for line in lines)
        inverse = {"left of": "right of", "above": "below"}[relation]
        assert other == (two, b, inverse, one, a)
        if relation == "left of":
            assert not pixels[:8].any()
            assert not pixels[24:].any()
            places = pixels[:, :16], pixels[:, 16:]
        else:
            assert not pixels[:, :8].any()
            assert not pixels[:, 24:].any()
            places = pixels[:16], pixels[16:]
        assert tuple(map(color_of, places)) == (one, two)
        assert a in NUMERALS
        assert b in NUMERALS


def test_both_relations_all_colors_and_digits_occur(packed):
    told = [words_of(lines[0]) for _, lines in samples(packed)]
    assert {words[2] for words in told} == {"left of", "above"}
    assert {words[0] for words in told} == set(COLORS)
    assert {words[1] for words in told} == set(NUMERALS)


def test_what_is_unseen_occurs_in_no_image(packed):
    prompts = (packed / "unseen.txt").read_text().splitlines()
    truth = json.loads((packed / "unseen.json").read_text())
    assert [entry["prompt"] for entry in truth] == prompts
    assert len(set(prompts)) == UNSEEN
    trained = {line for _, lines in samples(packed) for line in lines}
    assert not trained & set(prompts)
    by_caption = {line: scene for scene in all_scenes() for line in scene.captions()}
    assert len(by_caption) == 2 * 7200  # no two scenes share a caption
    for entry in truth:
        scene = by_caption[entry["prompt"]]
        assert not trained & set(scene.captions())  # nor the other way to say it
        assert [list(scene.colors), list(scene.digits)] == [entry["colors"], entry["digits"]]
        assert scene.relation == entry["relation"]


def test_every_caption_fits_the_manifests_length(packed):
    longest = max(len(line.encode()) for scene in all_scenes() for line in scene.captions())
    assert Manifest.load(packed).text.length == longest == 40


def test_the_data_is_good_and_always_the_same(packed, tmp_path):
    assert check_data(packed, tmp_path / "sheet.png").problems == []
    pack_captioned_digits(tmp_path / "again", 4, images=IMAGES, unseen=UNSEEN)
    assert members(tmp_path / "again") == members(packed)
    pack_captioned_digits(tmp_path / "other", 4, images=IMAGES, unseen=UNSEEN, seed=1)
    assert members(tmp_path / "other") != members(packed)
    with pytest.raises(UserError, match="already holds"):
        pack_captioned_digits(tmp_path / "again", 4, images=IMAGES)
