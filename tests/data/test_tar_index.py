import io
import tarfile

import pytest

from diffmoe.data.tar_index import read_member, tar_entries, tar_members


def write_tar(path, files, kind=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


LONG = "folder/" * 20 + "long.name.npy"
FILES = [("a.npy", b"x" * 700), ("a.cls", b"3"), ("d/b.c.npy", b""), ("é.txt", b"z" * 512)]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("files", [FILES, [*FILES, (LONG, b"deep")], []])
def test_members_are_those_that_tarfile_finds(tmp_path, files, kind):
    write_tar(tmp_path / "x.tar", files, kind)
    with open(tmp_path / "x.tar", "rb") as stream:
        members = tar_members(stream.fileno())
        assert [(m.name, read_member(stream.fileno(), m)) for m in members] == files


def test_folders_and_links_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind, name in [(tarfile.DIRTYPE, "a"), (tarfile.SYMTYPE, "a.npy")]:
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    with open(tmp_path / "x.tar", "rb") as stream:
        assert tar_members(stream.fileno()) == []


def test_entries_are_samples_as_webdataset_groups_them(tmp_path):
    files = [
        ("a.Npy", b"1"),
        ("a.cls", b"2"),
        ("__meta__", b""),
        ("b.x.npy", b"3"),
        ("a.cls", b"4"),
    ]
    write_tar(tmp_path / "x.tar", [*files, ("nodot", b"5")])
    with open(tmp_path / "x.tar", "rb") as stream:
        entries = tar_entries(stream.fileno())
    found = [(entry.key, list(entry.members)) for entry in entries]
    assert found == [("a", ["npy", "cls"]), ("b", ["x.npy"]), ("a", ["cls"])]
    write_tar(tmp_path / "x.tar", [("a.cls", b"1"), ("a.cls", b"2")])
    with (
        open(tmp_path / "x.tar", "rb") as stream,
        pytest.raises(ValueError, match=r"a\.cls occurs twice"),
    ):
        tar_entries(stream.fileno())


@pytest.mark.parametrize("keep", [0, 100, 512, 1000, 1024, 2048, 2560, 3072])
def test_a_cut_is_found_wherever_it_is(tmp_path, keep):
    path = tmp_path / "x.tar"
    write_tar(path, FILES)
    path.write_bytes(path.read_bytes()[:keep])
    with (
        open(path, "rb") as stream,
        pytest.raises(ValueError, match=r"cut off|not an uncompressed"),
    ):
        tar_members(stream.fileno())


@pytest.mark.parametrize("content", [b"\xff" * 4096, b"garbage" * 1000, b"\x1f\x8b" + b"z" * 2000])
def test_garbage_is_no_tar(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with (
        open(tmp_path / "x.tar", "rb") as stream,
        pytest.raises(ValueError, match="not an uncompressed tar"),
    ):
        tar_members(stream.fileno())
