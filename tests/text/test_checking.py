"""check_data finds whatever is wrong with captions and their features."""

import io
import re
import tarfile

import numpy as np
import pytest

from diffmoe.prepare.checking import check_data
from diffmoe.prepare.sharding import ShardOutput
from diffmoe.prepare.text_features import encode_text
from diffmoe.text.encoders import TransformersEncoder
from tests.helpers.shards import pack_captioned, relist


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def changed(directory, name: str, change) -> None:
    """Change one member of the first shard's first sample that has it."""
    file, done = directory / "000000.tar", False
    with tarfile.open(file) as tar:
        every = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(file, "w") as tar:
        for member, content in every:
            if member.name.endswith("." + name) and not done:
                content, done = change(content), True
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert done
    relist(directory)


def of_array(change):
    return lambda content: npy(change(np.load(io.BytesIO(content)).copy()))


def with_nan(array):
    array[0, 0] = np.nan
    return array


@pytest.fixture
def encoded(folders, tmp_path):
    pack_captioned(tmp_path / "plain")
    encode_text(
        tmp_path / "plain", ShardOutput(tmp_path / "data"), TransformersEncoder(folders / "clip", 8)
    )
    return tmp_path / "data"


def test_good_captions_are_told_of(encoded):
    report = check_data(encoded, None)
    assert report.problems == []
    text = str(report)
    assert "captions for clip-" in text
    assert "at most 8 tokens, width 16, pooled 16" in text
    assert "1 to 3 per sample, 3 to 8 tokens each; " in text


def test_bytes_that_are_cut_off_are_counted(tmp_path):
    pack_captioned(tmp_path)
    # Of 33 captions, the 11 long ones have 28 or 30 bytes.
    file = tmp_path / "manifest.json"
    file.write_text(file.read_text().replace('"length": 40', '"length": 28'))
    report = check_data(tmp_path, None)
    assert report.problems == []
    assert "1 to 3 per sample, 5 to 30 tokens each; 33.3% have 28 or more" in str(report)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("txt", lambda content: b"\n \n", "txt contains no caption"),
        ("txt", lambda content: content + b"\none more", "text_lengths.npy is int32"),
        ("txt", lambda content: b"\xff", "decode"),
        ("text.npy", of_array(lambda a: a[:-1]), "text.npy is float16 .* need float16"),
        ("text.npy", of_array(lambda a: a[:, :8]), r"text.npy is float16 \(\d+, 8\)"),
        ("text.npy", of_array(lambda a: a.astype(np.float32)), "text.npy is float32"),
        ("text.npy", of_array(with_nan), "text.npy contains NaN"),
        ("text.npy", lambda content: content[:-3], "instead of"),
        ("text_lengths.npy", of_array(lambda a: a * 0), r"a caption has 1\.\.8"),
        (
            "text_lengths.npy",
            of_array(lambda a: a[:, None]),
            "text_lengths.npy is int32 .* one dimension",
        ),
        ("text_lengths.npy", of_array(lambda a: a.astype("U4")), "text_lengths.npy is <U4"),
        ("text_lengths.npy", of_array(lambda a: a - 1), "text.npy is float16"),
        ("text_pooled.npy", of_array(lambda a: a[:, :4]), "text_pooled.npy is float16"),
    ],
)
def test_every_damage_is_a_problem_of_its_sample(encoded, name, change, message):
    changed(encoded, name, change)
    report = check_data(encoded, None)
    assert len(report.problems) == 1
    assert "sample 0" in report.problems[0]
    assert re.search(message, report.problems[0]), report.problems[0]
