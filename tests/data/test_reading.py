import contextlib
import io
import tarfile

import numpy as np
import pytest

from diffmoe.data.reading import decode_npy, read_shard
from diffmoe.errors import UserError
from tests.helpers.shards import relist


def test_a_shard_reads_back_what_was_packed_in_file_order(tmp_path, pack):
    manifest = pack(tmp_path, [4, 3], flips=True)
    samples = read_shard(tmp_path / "000001.tar", manifest)
    assert [sample.key for sample in samples] == ["00004", "00005", "00006"]
    assert [sample.label for sample in samples] == [4, 5, 6]
    assert [sample.array[0, 0, 0] for sample in samples] == [4, 5, 6]
    assert [sample.flip[0, 0, 0] for sample in samples] == [-4, -5, -6]


def test_shards_in_subfolders_are_found_by_their_longest_name(tmp_path, pack):
    manifest = pack(tmp_path, [4, 3])
    (tmp_path / "more").mkdir()
    (tmp_path / "000001.tar").rename(tmp_path / "more" / "000000.tar")
    second = manifest.shards[1].model_copy(update={"name": "more/000000.tar"})
    manifest = manifest.model_copy(update={"shards": [manifest.shards[0], second]})
    manifest.check(tmp_path)
    assert len(read_shard(tmp_path / "000000.tar", manifest)) == 4
    assert len(read_shard(tmp_path / "more" / "000000.tar", manifest)) == 3


@pytest.mark.parametrize("claimed", [2, 5])
def test_another_count_than_the_manifests_is_refused(tmp_path, pack, claimed):
    manifest = pack(tmp_path, [4])
    manifest.shards[0].samples = claimed
    message = rf"000000\.tar holds 4 samples, {claimed} in manifest\.json"
    with pytest.raises(UserError, match=message):
        read_shard(tmp_path / "000000.tar", manifest)


# Inside the last sample's array; at a member's end, where a tar ends without a word; at nothing.
@pytest.mark.parametrize("keep", [4 * 2048 - 300, 2 * 2048, 0])
def test_a_truncated_shard_is_named(tmp_path, pack, keep):
    manifest = pack(tmp_path, [4])
    shard = tmp_path / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"000000\.tar cannot be read \(truncated: \d+ bytes"):
        read_shard(shard, manifest)


def test_a_missing_shard_is_named(tmp_path, pack):
    manifest = pack(tmp_path, [4])
    (tmp_path / "000000.tar").unlink()
    with pytest.raises(UserError, match=r"000000\.tar cannot be read.*No such file"):
        read_shard(tmp_path / "000000.tar", manifest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"content": "mean_std"}, r"sample 00000: moments\.npy is missing \(there is cls, latent"),
        ({"flips": True}, r"sample 00000: latent_flip\.npy is missing"),
        ({"shape": (4, 4, 4)}, r"latent\.npy has shape \(2, 4, 4\).*shape=\(4, 4, 4\)"),
        ({"classes": 3}, r"sample 00003: label 3 is outside the classes 0\.\.2"),
    ],
)
def test_a_manifest_that_disagrees_with_the_shard_is_refused(tmp_path, pack, changes, message):
    wrong = pack(tmp_path, [4]).model_copy(update=changes)
    with pytest.raises(UserError, match=message):
        read_shard(tmp_path / "000000.tar", wrong)


def foreign_tar(path, **members: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo("00000." + name.replace("_npy", ".npy"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=array.dtype == object)
    return stream.getvalue()


GOOD = np.ones((2, 4, 4), np.float32)
NAN, INFINITE = GOOD.copy(), GOOD.copy()
NAN[1, 2, 3], INFINITE[1, 2, 3] = np.nan, np.inf


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"latent_npy": npy(NAN), "cls": b"0"},
            r"000000\.tar, sample 00000: NaN or infinity",
        ),
        ({"latent_npy": npy(INFINITE), "cls": b"0"}, "NaN or infinity in the data"),
        ({"latent_npy": npy(GOOD)}, r"cls is missing \(there is latent\.npy\)"),
        ({"latent_npy": npy(GOOD), "cls": b"-1"}, "label -1 is outside"),
        ({"latent_npy": npy(GOOD), "cls": b"cat"}, "cannot be decoded"),
        ({"latent_npy": b"no array", "cls": b"0"}, "cannot be decoded"),
        ({"latent_npy": npy(np.array([{}])), "cls": b"0"}, "cannot be decoded"),  # a pickle
        ({"latent_npy": npy(GOOD.astype(np.uint8)), "cls": b"0"}, "uint8"),
    ],
)
def test_bad_samples_are_named_with_shard_and_key(tmp_path, pack, members, message):
    pack(tmp_path, [1])
    foreign_tar(tmp_path / "000000.tar", **members)
    with pytest.raises(UserError, match=message):
        read_shard(tmp_path / "000000.tar", relist(tmp_path))


def test_a_truncated_tar_is_reported_as_incomplete(tmp_path, pack):
    pack(tmp_path, [4])
    shard = tmp_path / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"000000\.tar is not a complete tar \(cut off"):
        read_shard(shard, relist(tmp_path))


def test_one_flipped_bit_is_found(tmp_path, pack):
    manifest = pack(tmp_path, [4])
    shard = tmp_path / "000000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    manifest.check(tmp_path)  # the size is right
    with pytest.raises(UserError, match=r"000000\.tar cannot be read \(corrupt: sha256"):
        read_shard(shard, manifest)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype="<f4").reshape(2, 3, 4),
        np.asfortranarray(np.arange(24, dtype="<f2").reshape(2, 3, 4)),
        np.arange(6, dtype=">f8"),
        np.array(3.5),
        np.zeros((0, 4), np.uint8),
    ],
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_is_decoded_as_numpy_does_it(array, version):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    decoded, wanted = decode_npy(stream.getvalue()), np.load(io.BytesIO(stream.getvalue()))
    assert decoded.dtype == wanted.dtype
    assert np.array_equal(decoded, wanted)
    assert decoded.shape == wanted.shape


def test_garbage_is_not_decoded():
    good = npy(np.ones(8, np.float32))
    rng = np.random.default_rng(0)
    for bad in [b"", good[:9], good[:40], good[:-1], good + b"x", b"\0" * 200]:
        with pytest.raises(ValueError, match=r"npy|bytes"):
            decode_npy(bad)
    for _ in range(300):  # never anything but a ValueError
        content = bytearray(good)
        for place in rng.integers(0, 128, 3):
            content[place] = rng.integers(256)
        with contextlib.suppress(ValueError):
            decode_npy(bytes(content))
