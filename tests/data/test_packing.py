import tarfile

import numpy as np
import pytest

from diffmoe.data.manifest import Manifest
from diffmoe.data.packing import ShardWriter, shard_sizes
from diffmoe.errors import UserError
from diffmoe.files import sha256_of

ZEROS = np.zeros((2, 4, 4), np.float16)


def write(directory, samples_per_shard, fields, samples, **options):
    with ShardWriter(directory, samples_per_shard, **options, **fields) as writer:
        for sample in samples:
            writer.add(*sample)


def test_the_same_input_gives_the_same_bytes(tmp_path, pack, monkeypatch):
    first = pack(tmp_path / "a", [3, 2])
    monkeypatch.setattr("time.time", lambda: 4e9)  # another day
    second = pack(tmp_path / "b", [3, 2])
    assert first == second
    for name in ("000000.tar", "000001.tar", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_manifest_tells_counts_sizes_and_checksums(tmp_path, pack):
    pack(tmp_path, [3, 2])
    for shard, samples in zip(Manifest.load(tmp_path).shards, [3, 2], strict=True):
        path = tmp_path / shard.name
        assert shard.samples == samples
        assert shard.bytes == path.stat().st_size
        assert shard.sha256 == sha256_of(path)


@pytest.mark.parametrize(
    ("changes", "members"),
    [
        ({}, ["00000.cls", "00000.latent.npy"]),
        ({"flips": True}, ["00000.cls", "00000.latent.npy", "00000.latent_flip.npy"]),
        ({"content": "mean_std"}, ["00000.cls", "00000.moments.npy"]),
        (
            {"content": "mean_logvar", "flips": True},
            ["00000.cls", "00000.moments.npy", "00000.moments_flip.npy"],
        ),
    ],
)
def test_members_follow_the_content(tmp_path, pack, changes, members):
    pack(tmp_path, [1], **changes)
    with tarfile.open(tmp_path / "000000.tar") as tar:
        assert sorted(tar.getnames()) == members


def test_one_number_fills_shards_and_leaves_the_rest_in_the_last(tmp_path, fields):
    write(tmp_path, 4, fields, [(str(i), 0, ZEROS) for i in range(10)])
    assert [shard.samples for shard in Manifest.load(tmp_path).shards] == [4, 4, 2]


def test_shard_sizes_differ_by_one_at_most():
    assert shard_sizes(10, 4) == [3, 3, 2, 2]
    assert sum(shard_sizes(5000, 16)) == 5000
    with pytest.raises(UserError, match=r"3 samples into 4 shards; choose 1\.\.3"):
        shard_sizes(3, 4)


@pytest.mark.parametrize(
    ("key", "label", "array", "message"),
    [
        ("a.b", 0, ZEROS, "key 'a.b' contains a dot"),
        ("__a", 0, ZEROS, "begins with"),
        ("a", 7, ZEROS, r"label 7 is outside the classes 0\.\.6"),
        ("a", -1, ZEROS, "label -1 is outside"),
        ("a", 0, ZEROS[:1], r"shape \(1, 4, 4\).*needs \(2, 4, 4\)"),
        ("a", 0, ZEROS.astype(np.int64), "int64; use float16 or float32"),
        ("a", 0, np.full_like(ZEROS, np.nan), "NaN or infinity"),
        ("first", 0, ZEROS, "occurs twice"),
    ],
)
def test_bad_samples_are_refused_and_leave_no_data_folder(
    tmp_path, fields, key, label, array, message
):
    with pytest.raises(UserError, match=message):
        write(tmp_path, 9, fields, [("first", 0, ZEROS), (key, label, array)])
    assert list(tmp_path.iterdir()) == []


def test_a_flip_comes_exactly_when_the_manifest_says_so(tmp_path, fields):
    with pytest.raises(UserError, match="flips=False"):
        write(tmp_path, 9, fields, [("a", 0, ZEROS, ZEROS)])
    with pytest.raises(UserError, match="flips=True"):
        write(tmp_path, 9, fields | {"flips": True}, [("a", 0, ZEROS)])


def test_planned_counts_must_be_met(tmp_path, fields):
    with pytest.raises(ValueError, match="2 samples were added, 3"):
        write(tmp_path, [2, 1], fields, [("a", 0, ZEROS), ("b", 0, ZEROS)])
    with pytest.raises(ValueError, match="more than the 1 planned"):
        write(tmp_path, [1], fields, [("a", 0, ZEROS), ("b", 0, ZEROS)], overwrite=True)
    assert not (tmp_path / "manifest.json").exists()


def test_data_is_replaced_only_on_demand_and_wholly(tmp_path, pack, fields):
    pack(tmp_path, [2, 2, 2])
    with pytest.raises(UserError, match=r"already holds manifest\.json.*--overwrite"):
        pack(tmp_path, [4])
    write(tmp_path, [1], fields, [("a", 0, ZEROS)], overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000000.tar", "manifest.json"]
    (tmp_path / "manifest.json").unlink()  # a packing that was cut short
    with pytest.raises(UserError, match=r"already holds 000000\.tar"):
        pack(tmp_path, [4])
