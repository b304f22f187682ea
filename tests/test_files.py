"""Reading ends: whatever lies where a file should be, it is refused at once and by name."""

import json
import os
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffmoe import files
from diffmoe.checkpoints.folder import checkpoints_of, find_complete
from diffmoe.conversion.detect_format import open_source
from diffmoe.conversion.info import info
from diffmoe.conversion.state_dicts import load_state
from diffmoe.data.fetching import Unreadable, open_shard
from diffmoe.data.manifest import Manifest, Shard
from diffmoe.data.tar_index import MEMBER_LIMIT, Member, read_member, tar_members
from diffmoe.errors import UserError
from diffmoe.evaluation import results
from diffmoe.evaluation.evaluator import Evaluator, Judges
from diffmoe.evaluation.image_sets import open_images
from diffmoe.export.open import load
from diffmoe.export.stored_tensors import StoredTensors
from diffmoe.files import (
    check_tree,
    contained,
    does_not_exist,
    read_bytes,
    read_json,
    read_lines,
    sha256_of,
)
from diffmoe.npz_files import decode_npy, npz_rows, read_npz
from diffmoe.parallel.zero import read_ds_config
from diffmoe.prepare.image_folders import find_images
from diffmoe.recipes import load_config, read_yaml
from diffmoe.text.prompts import read_captions
from tests.helpers.damage import watched
from tests.helpers.encoding import encode
from tests.helpers.models import exported
from tests.helpers.shards import photograph
from tests.helpers.tiny import tiny_config


@pytest.fixture(autouse=True)
def _watch():
    with watched():
        yield


# Everything that can stand where a file should, and what is said of it.
SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "a pipe": (os.mkfifo, "a pipe"),
    "a folder": (Path.mkdir, "a folder"),
    "a terabyte": (lambda path: _sparse(path), "bytes are too many"),
    "nothing": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "a loop": (lambda path: path.symlink_to(path.name), "symbolic links"),
}


def _sparse(path: Path, size: int = 1 << 40) -> None:
    with open(path, "ab") as file:
        file.truncate(size)


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_told_without_waiting_for_it(tmp_path: Path, kind: str):
    make, told = SPECIAL[kind]
    make(tmp_path / "config.json")
    with pytest.raises(UserError, match=rf"config\.json: .*{told}"):
        read_json(tmp_path / "config.json")
    with pytest.raises(OSError, match=told):
        read_bytes(tmp_path / "config.json")
    if kind != "a terabyte":
        for read in (sha256_of, lambda path: list(read_lines(path))):
            with pytest.raises(OSError, match=told):
                read(tmp_path / "config.json")


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_models_file_that_is_none_is_named(tmp_path: Path, kind: str):
    for name in ("config.json", "model.safetensors"):
        model = exported(tmp_path / name, tiny_config(model__depth=2))
        (model / name).unlink()
        SPECIAL[kind][0](model / name)
        with pytest.raises(UserError) as told:
            load(model)
        assert str(model) in str(told.value)
        if kind not in ("nothing", "a loop"):  # which an exported folder is known by
            assert name in str(told.value)


def test_a_growing_or_endless_file_is_read_up_to_the_limit(tmp_path: Path, monkeypatch):
    (tmp_path / "x.json").write_bytes(b"7" * 101)
    with pytest.raises(OSError, match="101 bytes are too many, at most 100"):
        read_bytes(tmp_path / "x.json", 100)
    assert read_bytes(tmp_path / "x.json", 101) == b"7" * 101
    monkeypatch.setattr(files.os, "fstat", lambda _: os.stat_result([0o100644] + [0] * 9))
    with pytest.raises(OSError, match="at most 100"):  # as files of /proc, of no size
        read_bytes(tmp_path / "x.json", 100)


def test_lines_are_read_one_by_one_and_no_longer_than_a_line(tmp_path: Path, monkeypatch):
    (tmp_path / "x").write_bytes("é\r\n\nlast".encode())
    assert list(read_lines(tmp_path / "x")) == ["é", "", "last"]
    monkeypatch.setattr(files, "_LINE_LIMIT", 4)
    (tmp_path / "x").write_bytes(b"1234\n12345\n")
    with pytest.raises(OSError, match="a line has more than 4 bytes"):
        list(read_lines(tmp_path / "x"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\ufeff{}"])
def test_json_that_no_parser_takes_is_named(tmp_path: Path, text: str):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json is not JSON"):
        read_json(tmp_path / "x.json")


# Links.


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "link"])
def test_names_and_links_do_not_lead_out_of_a_folder(tmp_path: Path, name: str):
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "secret").write_text("{}")
    (folder / "link").symlink_to("../secret")
    with pytest.raises(UserError, match="leads out of its folder"):
        contained(folder, name)
    (folder / "inside").symlink_to("a")
    assert contained(folder, "inside") == folder / "inside"


def test_the_links_of_a_hugging_face_cache_are_followed(tmp_path: Path):
    repository = tmp_path / "models--x--y"
    model = exported(repository / "snapshots" / "0123", tiny_config(model__depth=2))
    (repository / "blobs").mkdir()
    for file in list(model.iterdir()):
        file.rename(repository / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert load(model).config.depth == 2


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "checksums.json"])
def test_an_exported_models_links_out_are_refused(tmp_path: Path, name: str):
    model = exported(tmp_path / "model", tiny_config(model__depth=2))
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    with (
        pytest.raises(UserError, match=rf"model/{name} leads out of its folder"),
        open_source(model) as source,
    ):
        source.checked()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index in range(4):
        folder = tmp_path / "photos" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photograph(index).save(folder / f"{index}.png")
    return tmp_path / "photos"


def _encode(photos: Path, **options) -> int:
    return encode(photos, photos.parent / "out", vae=None, size=8, shards=1, **options).samples


def test_class_folders_are_not_left_by_links(photos: Path):
    (photos.parent / "private").mkdir()
    photograph(7).save(photos.parent / "private/7.png")
    for link, target in (("a/7.png", "../../private/7.png"), ("b/more", "../../private")):
        (photos / link).symlink_to(target)
        with pytest.raises(UserError, match=rf"{link} is a link that leads out"):
            _encode(photos)
        with pytest.raises(UserError, match=rf"{link} is a link that leads out"):
            check_tree(photos, "")
        (photos / link).unlink()
    (photos / "b/again.png").symlink_to("1.png")  # within the folder
    (photos / "c").symlink_to("../private")
    with pytest.raises(UserError, match="--follow-links"):
        _encode(photos)
    assert _encode(photos, follow_links=True) == 6


def test_loops_and_special_files_in_folders_of_latents_are_refused(photos: Path):
    (photos / "a/loop").symlink_to("..")
    with pytest.raises(UserError, match="a link to a folder that contains it"):
        check_tree(photos, "")
    (photos / "a/loop").unlink()
    os.mkfifo(photos / "a/8.png")
    with pytest.raises(UserError, match=r"a/8\.png is a pipe"):
        check_tree(photos, "")


# YAML.


def test_aliases_are_counted_as_what_they_stand_for(tmp_path: Path):
    bomb = "a0: &a0 x\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
    )
    merge = "a0: &a0 {x: 1}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10)
    )
    for text in (bomb, merge, "a: &a [*a]", "a: &a {b: *a}"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError, match=r"x\.yaml is not valid YAML: .*aliases stand for"):
            load_config(str(tmp_path / "x.yaml"))
        with pytest.raises(UserError, match="aliases stand for"):
            load_config("mnist", ["data.path={" + text.replace("\n", ", ") + "}"])
    (tmp_path / "x.yaml").write_text("data: &d {workers: 3}\nmodel: {depth: 2}\noutput: x\n")
    assert load_config(str(tmp_path / "x.yaml")).data.workers == 3
    (tmp_path / "x.yaml").write_text("x: &d {lanes: 2}\ndata: {<<: *d, workers: 3}\n")
    with pytest.raises(UserError, match="unknown key x"):
        load_config(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize(
    "text", ["[" * 50_000, "a: " + "9" * 5000, "? [1]\n: 2", "1: 2", "x" * 70_000]
)
def test_yaml_that_no_parser_takes_is_named(tmp_path: Path, text: str):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml"):
        load_config(str(tmp_path / "x.yaml"))


# Sizes.


@pytest.mark.parametrize("field", ["width", "input_size", "depth", "num_classes", "in_channels"])
@pytest.mark.parametrize("value", [1 << 20, (1 << 20) - 4, 10**9, 10**30])
def test_absurd_sizes_of_a_model_are_refused(tmp_path: Path, field: str, value: int):
    model = exported(tmp_path / "model", tiny_config(model__depth=2))
    about = json.loads((model / "config.json").read_text())
    about["model"][field] = value
    sides = about["model"]["in_channels"], about["model"]["input_size"]
    about["latents"]["shape"] = [*sides, sides[1]]
    (model / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError) as told:
        load(model)
    assert str(model) in str(told.value)
    assert len(str(told.value)) < 2000


def test_a_safetensors_header_is_measured_before_it_is_read(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    raw = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 90 << 20) + raw[8:] + b" " * (90 << 10))
    _sparse(path, 100 << 20)
    with pytest.raises(UserError, match=r"model\.safetensors .*header has 94,371,840 bytes"):
        StoredTensors(tmp_path, path.name)


def test_tensors_that_repeat_their_numbers_are_refused(tmp_path: Path):
    torch.save({"ema": {"x": torch.zeros(1).expand(1 << 20, 1 << 20)}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: x has the shape \(1048576, 1048576\), but fewer"):
        load_state(tmp_path / "x.pt")


def test_a_packed_file_of_torch_is_refused(tmp_path: Path):
    torch.save({"ema": {"x": torch.zeros(1 << 20)}}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(UserError, match=r"x\.pt .*would unpack to 4,19"):
        load_state(tmp_path / "x.pt")


def _npy(header: dict | str, data: bytes = b"") -> bytes:
    text = str(header).encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + data


HEADERS = {
    "a terabyte": {"descr": "<f4", "fortran_order": False, "shape": (1 << 38,)},
    "a product that overflows": {
        "descr": "<f4",
        "fortran_order": False,
        "shape": (1 << 33, 1 << 31),
    },
    "sizes below zero": {"descr": "<f4", "fortran_order": False, "shape": (-1, -1)},
    "no bytes": {"descr": "V0", "fortran_order": False, "shape": (1 << 40,)},
    "objects": {"descr": "|O", "fortran_order": False, "shape": (1,)},
    "depth": "(" * 5000,
    "code": "__import__('os').system('touch was-run')",
    "sixty dimensions": {"descr": "<f4", "fortran_order": False, "shape": (1,) * 60},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_an_npy_header_is_held_against_its_bytes(tmp_path: Path, monkeypatch, kind: str):
    monkeypatch.chdir(tmp_path)
    raw = _npy(HEADERS[kind], b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"bytes|npy header|array of shape|objects"):
        decode_npy(raw)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", raw)
    for read in (read_npz, open_images, lambda path: list(npz_rows(path, "arr_0"))):
        with pytest.raises(UserError, match=r"x\.npz"):
            read(tmp_path / "x.npz")
    assert not Path("was-run").exists()


def test_an_npz_that_unpacks_to_many_times_its_size_is_refused(tmp_path: Path):
    np.savez_compressed(tmp_path / "x.npz", arr_0=np.zeros(100_000_000, np.uint8))
    assert (tmp_path / "x.npz").stat().st_size < 200_000
    for read in (read_npz, open_images):
        with pytest.raises(UserError, match=r"x\.npz .*would unpack to 100,000"):
            read(tmp_path / "x.npz")


def test_arrays_are_those_that_numpy_reads(tmp_path: Path):
    arrays = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "text": np.array("é"),
        "none": np.zeros((0, 3)),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    np.savez_compressed(tmp_path / "y.npz", **arrays)
    for name in ("x.npz", "y.npz"):
        found = read_npz(tmp_path / name)
        assert found.keys() == arrays.keys()
        for key, array in arrays.items():
            assert found[key].dtype == array.dtype
            assert np.array_equal(found[key], array)
    assert read_npz(tmp_path / "x.npz", "a", "other").keys() == {"a"}


# Tars.


def _tar(path: Path, info: tarfile.TarInfo, data: bytes = b"") -> int:
    with open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT) + data)
    _sparse(path)
    return os.open(path, os.O_RDONLY)


def test_a_terabyte_of_zeros_in_a_tar_is_not_read(tmp_path: Path):
    info = tarfile.TarInfo("a.npy")
    info.size = (1 << 40) - 1024
    (member,) = tar_members(_tar(tmp_path / "x.tar", info))
    assert member == Member("a.npy", 512, info.size)
    with pytest.raises(ValueError, match=r"a\.npy has 1,099,511,626,752 bytes"):
        read_member(0, member)
    assert MEMBER_LIMIT < 1 << 29


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_terabyte_between_members_is_not_read(tmp_path: Path, kind: bytes):
    info = tarfile.TarInfo("a.npy")
    info.type, info.size = kind, 1 << 39
    with pytest.raises(ValueError, match="549,755,813,888 bytes between"):
        tar_members(_tar(tmp_path / "x.tar", info))


def test_members_with_holes_and_sizes_below_zero_are_refused(tmp_path: Path):
    info = tarfile.TarInfo("a.npy")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"00000000000\0", b"00000001000\0"  # one extent
    header[483:495] = b"17777777777\0"  # of eight billion bytes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + b"\0" * 512 + b"\0" * 1024)
    with (
        open(tmp_path / "x.tar", "rb") as file,
        pytest.raises(ValueError, match="is a sparse file"),
    ):
        tar_members(file.fileno())
    negative = bytearray(tarfile.TarInfo("a.npy").tobuf(tarfile.GNU_FORMAT))
    negative[124:136] = (-1536).to_bytes(12, "big", signed=True)
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative)
    (tmp_path / "x.tar").write_bytes(bytes(negative) * 4 + b"\0" * 1024)
    with (
        open(tmp_path / "x.tar", "rb") as file,
        pytest.raises(ValueError, match="not an uncompressed"),
    ):
        tar_members(file.fileno())


@pytest.mark.parametrize("kind", ["a device", "a pipe", "a folder", "a terabyte"])
def test_a_shard_that_is_no_file_is_given_up_at_once(tmp_path: Path, kind: str):
    SPECIAL[kind][0](tmp_path / "0.tar")
    shard = Shard(name="0.tar", samples=1, bytes=1000, sha256="0" * 64)
    with pytest.raises(Unreadable, match=r"a (device|pipe|folder), not a regular|too long"):
        open_shard(str(tmp_path / "0.tar"), shard, attempts=1)


def test_absurd_sizes_of_a_manifest_are_refused(tmp_path: Path):
    fields = {"content": "sample", "scaled": True, "shape": [1, 2, 2], "flips": False, "classes": 2}
    fields |= {"shards": [], "autoencoder": "identity", "source": "x"}
    for change in ({"shape": [1 << 20, 1 << 20, 1]}, {"classes": 1 << 40}):
        (tmp_path / "manifest.json").write_text(json.dumps(fields | change))
        with pytest.raises(UserError, match=rf"manifest\.json: {next(iter(change))}"):
            Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is not JSON"):
        Manifest.load(tmp_path)


def test_a_path_that_is_not_there_is_answered_with_the_nearest_that_is(tmp_path: Path):
    (tmp_path / "runs" / "mnist" / "step-00000300").mkdir(parents=True)
    (tmp_path / "runs" / "photos").mkdir()
    runs = tmp_path / "runs"
    near = f"{runs}/mnsit does not exist (did you mean {runs}/mnist?)"
    assert does_not_exist(runs / "mnsit") == near
    for wrong, meant in (
        ("run/photos", "runs/photos"),
        ("runs/mnits/step-00000300", "runs/mnist/step-00000300"),
    ):
        told = f"{tmp_path / wrong} does not exist (did you mean {tmp_path / meant}?)"
        assert does_not_exist(tmp_path / wrong) == told
    assert does_not_exist(runs / "zzz") == f"{runs}/zzz does not exist"
    openers = (
        *(find_complete, checkpoints_of, Manifest.load, results.read, info, open_images, read_yaml),
        *(find_images, read_captions, read_ds_config, lambda path: Evaluator(Judges(str(path)))),
        lambda path: Manifest.load(path, "validation.path"),
    )
    for opened in openers:
        with pytest.raises(UserError, match=re.escape(near)):
            opened(runs / "mnsit")
