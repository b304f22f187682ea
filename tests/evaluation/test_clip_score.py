"""CLIP score over tiny random CLIPs, against the model's own parts and by hand."""

import json
import math

import numpy as np
import pytest
import torch

from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import open_images
from tests.helpers.pictures import pictures, write_samples
from tests.helpers.tools import told

pytest.importorskip("transformers", reason="transformers is not installed (extra text)")

from diffmoe.evaluation.clip_score import Clip, clip_score
from tests.helpers.text_folders import save_clip, save_t5

CAPTIONS = ["a red one", "a blue two left of a green three", "two", "three", "of a red three left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("models") / "tiny-clip", seed=5)  # of both signs


@pytest.fixture
def samples(tmp_path):
    return write_samples(tmp_path / "samples", pictures(23), captions=CAPTIONS)


def by_hand(folder, images: np.ndarray, captions: list[str]) -> list[float]:
    """One image at a time, without padding, through the two halves of the model."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prepare = transformers.CLIPImageProcessor.from_pretrained(folder)
    scores = []
    for image, caption in zip(images, captions, strict=True):
        pixels = prepare(images=image, return_tensors="pt", input_data_format="channels_last")
        ids = torch.tensor([tokenizer(caption).input_ids[:12]])
        seen = model.visual_projection(model.vision_model(pixels.pixel_values).pooler_output)[0]
        read = model.text_projection(model.text_model(ids).pooler_output)[0]
        cosine = (seen @ read / (seen.norm() * read.norm())).item()
        scores.append(100 * max(cosine, 0))
    return scores


def test_scores_are_clamped_cosines(folder):
    images = pictures(5)
    scores = Clip(folder).scores(images, CAPTIONS)
    wanted = by_hand(folder, images, CAPTIONS)
    assert scores.tolist() == pytest.approx(wanted, abs=1e-3)
    assert any(score == 0 for score in wanted)  # else nothing was clamped
    assert any(score > 0 for score in wanted)


def test_every_image_goes_with_the_caption_of_its_label(folder, samples):
    images = pictures(23)
    wanted = by_hand(folder, images, [CAPTIONS[k % 5] for k in range(23)])
    found = clip_score(open_images(samples), Clip(folder), batch=4)
    assert found == pytest.approx(sum(wanted) / 23, abs=1e-3)


@pytest.mark.slow
def test_the_command_names_the_extractor(folder, samples, tmp_path):
    output = told(
        "tools/evaluate.py", "images", samples, "--clip", folder, "--out", tmp_path / "figures"
    )
    (result,) = [json.loads(line) for line in (tmp_path / "figures" / "results.jsonl").open()]
    value = result["metrics"]["CLIP-score-tiny-clip"]
    assert f"CLIP-score-tiny-clip  {value:.5g}" in output
    assert math.isfinite(value)
    assert result["extractor"]["sha256"] == Clip(folder).checksum
    assert result["images"]["captions"] == CAPTIONS


def test_what_has_no_captions_or_is_no_clip_is_refused(folder, tmp_path):
    plain = open_images(write_samples(tmp_path / "samples", pictures(3)))
    with pytest.raises(UserError, match="has no captions"):
        clip_score(plain, Clip(folder))
    save_t5(tmp_path / "t5")
    with pytest.raises(UserError, match="is not a CLIP"):
        Clip(tmp_path / "t5")
