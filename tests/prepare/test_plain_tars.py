"""Compressed tars are read as the plain tars in them."""

import bz2
import gzip
import io
import lzma
import tarfile

import pytest

from diffmoe.errors import UserError
from diffmoe.prepare import plain_tars
from diffmoe.work import Ranks
from tests.helpers.encoding import encode
from tests.helpers.shards import members, photograph


def zstd(raw: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra arrow)")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


PACKED = {
    "tar.gz": gzip.compress,
    "tgz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tbz2": bz2.compress,
    "tar.xz": lzma.compress,
    "txz": lzma.compress,
    "tar.zst": zstd,
    "tzst": zstd,
}


def plain(indices: range) -> bytes:
    """A tar of pictures with their classes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for index in indices:
            picture = io.BytesIO()
            photograph(index).save(picture, "png")
            for kind, content in [("png", picture.getvalue()), ("cls", b"%d" % (index % 3))]:
                info = tarfile.TarInfo(f"a/{index:03d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def pack(root, out, **options):
    return encode(root, out, vae=None, size=16, shards=2, classes=3, max_bad=0, **options)


@pytest.mark.parametrize("ending", PACKED)
def test_a_compressed_tar_is_packed_as_the_plain_one(tmp_path, ending):
    """One of two; the other is plain. Compressors on many cores leave several streams."""
    for folder, name in [("plain", "1.tar"), ("packed", f"1.{ending}")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(plain(range(2)))
        raw, compress = plain(range(2, 6)), PACKED[ending]
        parts = compress(raw[:5000]) + compress(raw[5000:])
        (tmp_path / folder / name).write_bytes(raw if folder == "plain" else parts)
    pack(tmp_path / "plain", tmp_path / "wanted")
    manifest = pack(tmp_path / "packed", tmp_path / "out")
    assert members(tmp_path / "out") == members(tmp_path / "wanted")
    assert manifest.samples == 6
    assert sorted(file.name for file in (tmp_path / "out").iterdir() if file.is_dir()) == [
        ".packing"
    ]


@pytest.mark.parametrize("ending", ["tar.gz", "tar.bz2", "tar.xz", "tar.zst"])
def test_a_damaged_one_is_named(tmp_path, ending):
    raw = PACKED[ending](plain(range(4)))
    file = tmp_path / f"in/a.{ending}"
    file.parent.mkdir()
    for damaged in (raw[: len(raw) // 2], raw[:-5], b"", b"\0" * 600, raw[:200] + b"?" * 99):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"a\.{ending} cannot be (unpacked|read)"):
            pack(file.parent, tmp_path / "out")
        assert not list((tmp_path / "out/.unpacked").glob("*.tmp"))


@pytest.mark.parametrize("ending", ["tar.gz", "tar.bz2", "tar.xz", "tar.zst"])
def test_a_bomb_is_refused(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(plain_tars, "_SMALL", 4 << 20)
    (tmp_path / "in").mkdir()
    (tmp_path / f"in/a.{ending}").write_bytes(PACKED[ending](bytes(8 << 20)))
    with pytest.raises(UserError, match=r"bytes unpack to over 4,194,304; remove it"):
        pack(tmp_path / "in", tmp_path / "out")
    assert list((tmp_path / "out/.unpacked").iterdir()) == []


def test_each_rank_begins_with_another(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for number in range(4):
        content = gzip.compress(plain(range(3 * number, 3 * number + 3)))
        (tmp_path / f"in/{number}.tar.gz").write_bytes(content)
    pack(tmp_path / "in", tmp_path / "one")
    seen = []
    unpack = plain_tars.unpack
    monkeypatch.setattr(plain_tars, "unpack", lambda *a: (seen.append(a[0].name), unpack(*a)))
    assert pack(tmp_path / "in", tmp_path / "out", ranks=Ranks(1, 2)) is None
    assert [name[0] for name in seen] == ["2", "3", "0", "1"]
    assert pack(tmp_path / "in", tmp_path / "out", ranks=Ranks(0, 2)) is not None
    assert len(seen) == 4
    assert members(tmp_path / "out") == members(tmp_path / "one")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tgz").write_bytes(gzip.compress(plain(range(2))))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=r"out/\.unpacked cannot be written"):
        pack(tmp_path / "in", tmp_path / "out")


def test_a_tar_of_nothing_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tgz").write_bytes(gzip.compress(plain(range(0))))
    with pytest.raises(UserError, match="in holds no images"):
        pack(tmp_path / "in", tmp_path / "out")
