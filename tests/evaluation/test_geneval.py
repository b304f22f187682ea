"""The folders are those that GenEval's README shows, each image in that of its prompt."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmoe.errors import UserError
from diffmoe.evaluation.geneval import export_geneval
from diffmoe.evaluation.image_sets import open_images
from tests.helpers.pictures import pictures, write_samples
from tests.helpers.tools import told

PROMPTS = [f"a photo of {what}" for what in ("a bench", "two cats", "a dog", "a kite", "a red cow")]
IMAGES = pictures(20)  # image k is of prompt k modulo 5


@pytest.fixture
def metadata(tmp_path) -> Path:
    file = tmp_path / "evaluation_metadata.jsonl"
    entries = [{"tag": "single_object", "include": [{"count": 1}], "prompt": p} for p in PROMPTS]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def samples(folder, images=IMAGES, captions=tuple(PROMPTS)):
    return write_samples(folder, images, captions=list(captions))


@pytest.mark.slow
def test_every_prompt_gets_its_line_and_its_images_in_order(tmp_path, metadata):
    folder, out = samples(tmp_path / "samples"), tmp_path / "out"
    assert "4 images of each prompt" in told(
        "tools/export_geneval.py", folder, metadata, "--out", out
    )
    assert sorted(p.name for p in out.iterdir()) == [f"{n:05d}" for n in range(5)]
    for number, line in enumerate(metadata.read_text().splitlines()):
        place = out / f"{number:05d}"
        assert sorted(p.name for p in place.iterdir()) == ["metadata.jsonl", "samples"]
        assert (place / "metadata.jsonl").read_text().strip() == line
        files = sorted((place / "samples").iterdir())
        assert [file.name for file in files] == [f"{n:04d}.png" for n in range(4)]
        for n, file in enumerate(files):
            assert np.array_equal(np.asarray(Image.open(file)), IMAGES[number + 5 * n])


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, metadata):
    other = [*PROMPTS[:2], "a photo of an owl", *PROMPTS[3:]]
    for name, images, captions, message in [
        (
            "other",
            IMAGES,
            other,
            r"line 3: 'a photo of a dog', but caption 2 .*'a photo of an owl'",
        ),
        ("fewer", IMAGES, PROMPTS[:4], "has 5 prompts, .* 20 images of 4 captions"),
        ("uneven", IMAGES[:18], PROMPTS, "sample the same number of each prompt"),
    ]:
        folder = samples(tmp_path / name, images, captions)
        with pytest.raises(UserError, match=message):
            export_geneval(open_images(folder), metadata, tmp_path / "out")
    uneven = write_samples(tmp_path / "random", IMAGES, classes=4, captions=PROMPTS)
    with pytest.raises(UserError, match="0 to 5 images of a prompt; sample with --labels balanced"):
        export_geneval(open_images(uneven), metadata, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    full = samples(tmp_path / "samples")
    with pytest.raises(UserError, match="is not empty"):
        export_geneval(open_images(full), metadata, full)
    metadata.write_text('{"tag": "x"}\n')
    with pytest.raises(UserError, match="not GenEval's evaluation_metadata"):
        export_geneval(open_images(full), metadata, tmp_path / "out")
