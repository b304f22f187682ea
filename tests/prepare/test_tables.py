"""Data sets of Hugging Face on disk: packed, they are what a folder of the same images is."""

import os
import sys

import pytest

from diffmoe.errors import UserError
from diffmoe.prepare import plain_tars, tables
from diffmoe.work import Ranks
from tests.helpers.encoding import encode
from tests.helpers.processes import killed
from tests.helpers.shards import members, photograph

pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra arrow)")
from tests.helpers.tables import (
    IMAGE,
    LABELS,
    NAMES,
    captioned,
    cells,
    labeled,
    pa,
    png,
    save_to_disk,
    table,
    write_arrow,
    write_parquet,
)

N = len(LABELS)


def pack(root, out, **options):
    return encode(root, out, **{"vae": None, "size": 16, "shards": 2, "max_bad": 0, **options})


@pytest.fixture
def folder(tmp_path):
    """The pictures of `labeled()` in class folders."""
    for index, label in enumerate(LABELS):
        place = tmp_path / "folder" / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        photograph(index).save(place / f"{index}.png")
    return tmp_path / "folder"


def hub(root):
    write_parquet(root / "data/train-00000-of-00002.parquet", labeled(0, 4))
    write_parquet(root / "data/train-00001-of-00002.parquet", labeled(4))
    write_parquet(root / "data/test-00000-of-00001.parquet", labeled(7, 9))
    (root / "README.md").write_text("---\n---\n")


def from_the_cache(root):
    """Where the files of a repository are links to blobs beside the revisions."""
    cache = root.parents[1]
    hub(cache / "written")
    (cache / "blobs").mkdir()
    (root / "data").mkdir(parents=True)
    for number, file in enumerate((cache / "written/data").iterdir()):
        file.rename(cache / "blobs" / str(number))
        (root / "data" / file.name).symlink_to(f"../../../blobs/{number}")


def saved(root):
    save_to_disk(root, {"test": [labeled(7, 9)], "train": [labeled(0, 4), labeled(4)]})


def saved_alone(root):
    write_arrow(root / "data-00000-of-00001.arrow", labeled())
    (root / "dataset_info.json").write_text("{}")


def converted(root):
    """As the hub converts data sets."""
    for number, part in enumerate([labeled(0, 4), labeled(4)]):
        write_parquet(root / f"{number:04d}.parquet", part)


def arrow_files(root):
    write_arrow(root / "train.arrow", labeled(), of_files=True)
    write_arrow(root / "cache-0123.arrow", labeled(7, 9))


LAYOUTS = {
    "hub": (hub, "data", "train"),
    "cache": (from_the_cache, "snapshots/0123", "train"),
    "save_to_disk": (saved, "data", "train"),
    "save_to_disk without splits": (saved_alone, "data", None),
    "converted": (converted, "data", None),
    "Arrow files": (arrow_files, "data", None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_data_set_is_packed_as_its_images_in_class_folders_are(folder, tmp_path, layout):
    write, name, split = LAYOUTS[layout]
    write(tmp_path / name)
    wanted = pack(folder, tmp_path / "wanted")
    manifest = pack(tmp_path / name, tmp_path / "out", split=split)
    assert members(tmp_path / "out") == members(tmp_path / "wanted")
    assert (manifest.samples, manifest.class_names) == (N, NAMES)
    assert manifest.shards == wanted.shards
    assert not (tmp_path / "out/.unpacked").exists()
    if split is not None:
        other = pack(tmp_path / name, tmp_path / "other", split="test")
        assert other.samples == 2
        with pytest.raises(UserError, match=r"holds the splits test, train; give one .* --split"):
            pack(tmp_path / name, tmp_path / "none")


def test_captions_are_packed_as_those_of_files_are(tmp_path):
    lines = [["a dog"], ["two\nlines", "Bild grün"], ["three", "four", "five"]]
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", captioned(lines))
    (tmp_path / "folder").mkdir()
    for index, captions in enumerate(lines):
        photograph(index).save(tmp_path / f"folder/{index}.png")
        text = "\n".join(" ".join(caption.split()) for caption in captions)
        (tmp_path / f"folder/{index}.txt").write_text(text, encoding="utf-8")
    pack(tmp_path / "folder", tmp_path / "wanted", captioned=True)
    options = {"captioned": True, "columns": {"text": "captions"}}
    manifest = pack(tmp_path / "data", tmp_path / "out", **options)
    assert members(tmp_path / "out") == members(tmp_path / "wanted")
    assert (manifest.samples, manifest.classes, manifest.class_names) == (3, 1, None)
    options["columns"] = {"text": "first"}
    pack(tmp_path / "data", tmp_path / "first", **options)
    assert members(tmp_path / "first") != members(tmp_path / "out")
    with pytest.raises(UserError, match=r"begun with other settings .*columns: .*--overwrite"):
        pack(tmp_path / "data", tmp_path / "out", **options)


def test_columns_that_are_not_plain_must_be_named(folder, tmp_path):
    rows = captioned([["a"], ["b"]])
    write_parquet(tmp_path / "data/train.parquet", rows)
    out = tmp_path / "out"
    for options, message in [
        ({"captioned": True}, r"which column is the text\? Give .* text=NAME \(captions, first\)"),
        ({"columns": {"label": "first"}}, r"the label\? .* label=NAME \(width\), or label= if"),
        ({"columns": {"text": "first"}}, "--columns text= needs --captions"),
        (
            {"columns": {"label": "width"}, "captioned": True},
            "--columns label= does not go with --captions",
        ),
        ({"columns": {"image": "width"}}, r"the image\? .* image=NAME \(picture\)"),
        ({"columns": {"image": "nothing"}}, r"the image\? .* image=NAME \(picture\)"),
        ({"columns": {"label": "width"}}, r"holds class numbers but not how many .* --classes N"),
        (
            {"columns": {"label": "width"}, "classes": 9},
            r"parquet/0+: label 24 is outside the classes 0",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            pack(tmp_path / "data", out, **options)
    assert not out.exists() or [file.name for file in out.iterdir()] == [".unpacked"]
    assert pack(tmp_path / "data", out, columns={"label": ""}).class_names == ["data"]
    manifest = pack(tmp_path / "data", tmp_path / "b", columns={"label": "width"}, classes=25)
    assert (manifest.classes, manifest.class_names, manifest.samples) == (25, None, 2)
    # Of two columns of integers, `datasets` says that one is the class.
    features = {"fine": {"names": NAMES, "_type": "ClassLabel"}, "id": {"_type": "Value"}}
    columns = {"image": pa.array(cells(range(2)), IMAGE), "fine": [1, 0], "id": [7, 8]}
    write_parquet(tmp_path / "two/0.parquet", table(columns, features))
    assert pack(tmp_path / "two", tmp_path / "c").class_names == NAMES
    write_parquet(tmp_path / "plain/0.parquet", pa.table(columns))
    with pytest.raises(UserError, match=r"the label\? .* label=NAME \(fine, id\)"):
        pack(tmp_path / "plain", tmp_path / "d")
    write_parquet(tmp_path / "bare/0.parquet", pa.table({"jpg": [png(0), png(1)]}))
    assert pack(tmp_path / "bare", tmp_path / "e").class_names == ["bare"]
    with pytest.raises(UserError, match="holds no tables, which --split and --columns are for"):
        pack(folder, tmp_path / "f", split="train")


def test_bad_images_are_skipped_and_labels_that_are_none_refused(tmp_path):
    bad = [{"bytes": None, "path": "far/away.png"}, None, {"bytes": b"<html>", "path": None}]
    images = pa.array([*cells(range(2)), *bad, *cells(range(5, 6))], IMAGE)
    rows = table({"image": images, "label": [0, 1, 1, 1, 0, 2]}, {})
    write_parquet(tmp_path / "data/train.parquet", rows)
    manifest = pack(tmp_path / "data", tmp_path / "out", classes=3, max_bad=3)
    assert manifest.samples == 3
    told = sorted(manifest.skipped)
    assert told[:2] == [
        f"train.parquet/{row:08d}: ValueError: it is empty, without the bytes of an image"
        for row in (2, 3)
    ]
    assert told[2].startswith("train.parquet/00000004: ValueError: not one of JPEG, PNG")
    for label in (-1, None):
        write_parquet(
            tmp_path / "none/a.parquet",
            pa.table({"image": images[:2], "label": pa.array([0, label], pa.int64())}),
        )
        with pytest.raises(UserError, match=rf"a\.parquet, row 1: label is {label}, no class"):
            pack(tmp_path / "none", tmp_path / "never", classes=3)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_damaged_file_is_named(tmp_path, kind):
    file = tmp_path / f"data/train.{kind}"
    (write_parquet if kind == "parquet" else write_arrow)(file, labeled())
    raw = file.read_bytes()
    for damaged in (raw[: len(raw) // 2], raw[: len(raw) - 9], b"", b"no table" * 50):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"train\.{kind} cannot be read .*copy it again"):
            pack(file.parent, tmp_path / "out")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=rf"train\.{kind} cannot be read: it is a pipe"):
        pack(file.parent, tmp_path / "out")
    file.unlink()
    (tmp_path / "elsewhere").write_bytes(raw)
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of its folder"):
        pack(file.parent, tmp_path / "out")
    assert list(tmp_path.rglob("*.tmp")) == []
    assert pack(file.parent, tmp_path / "out", follow_links=True).samples == N


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    """One image of a megabyte of zeros, a hundred times: a file of some kilobytes."""
    monkeypatch.setattr(plain_tars, "_SMALL", 16 << 20)
    image = pa.array([{"bytes": bytes(1 << 20), "path": None}], IMAGE)
    rows = pa.table({"image": pa.chunked_array([image] * 100)})
    write_parquet(tmp_path / "data/train.parquet", rows, row_group_size=100, compression="zstd")
    assert (tmp_path / "data/train.parquet").stat().st_size < 1 << 18
    with pytest.raises(UserError, match=r"bytes unpack to over 16,777,216; remove it"):
        pack(tmp_path / "data", tmp_path / "out")
    assert list((tmp_path / "out/.unpacked").iterdir()) == []


def test_ranks_share_the_files_and_a_kill_costs_one(folder, tmp_path):
    """Killed while the second file's rows are written, by another rank while shards are."""
    for number in range(3):
        write_parquet(tmp_path / f"data/{number}.parquet", labeled(3 * number, 3 * number + 3))
    out, unpacked = tmp_path / "out", tmp_path / "out/.unpacked"
    pack(tmp_path / "data", tmp_path / "one", workers=1)
    assert killed(lambda: pack(tmp_path / "data", out, ranks=Ranks(1, 2)), tables, "_label", 5)
    (first,) = unpacked.glob("*.tar")
    assert len(list(unpacked.glob("*.tmp"))) == 1
    time = first.stat().st_mtime_ns
    assert killed(lambda: pack(tmp_path / "data", out), plain_tars, "replacing", 2)
    assert pack(tmp_path / "data", out, ranks=Ranks(0, 2)) is None
    assert first.stat().st_mtime_ns == time
    assert len(list(unpacked.iterdir())) == 3  # and nothing of the dead
    assert pack(tmp_path / "data", out, ranks=Ranks(1, 2)) is not None
    assert members(out) == members(tmp_path / "one")
    assert not unpacked.exists()


def test_a_file_that_has_changed_is_written_anew(tmp_path):
    file = tmp_path / "data/0.parquet"
    rows = labeled(0, 2)
    images = pa.array([{"bytes": b"no", "path": None}, *cells(range(1))], IMAGE)
    write_parquet(file, rows.set_column(0, "image", images))
    with pytest.raises(UserError, match="--max-bad allows"):
        pack(file.parent, tmp_path / "out")
    write_parquet(file, rows)
    assert pack(file.parent, tmp_path / "out").samples == 2


def test_metadata_beside_images_is_no_table(folder, tmp_path):
    write_parquet(folder / "metadata.parquet", pa.table({"file_name": ["ant/0.png"]}))
    assert pack(folder, tmp_path / "out").samples == N


def test_without_pyarrow_it_is_told_what_to_install(tmp_path, monkeypatch):
    write_parquet(tmp_path / "data/train.parquet", labeled())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'parquet needs pyarrow.*pip install "diffmoe\[arrow\]"'):
        pack(tmp_path / "data", tmp_path / "out")


@pytest.mark.slow
def test_the_command(tmp_path, tool):
    saved(tmp_path / "data")
    arguments = ["--images", tmp_path / "data", "--pixels", "--size", 16, "--shards", 2]
    done = tool("encode_latents", *arguments, "--split", "train", "--out", tmp_path / "out")
    assert f"{N} samples of 3 classes in 2 shards" in done.stdout, done.stderr
    named = ["--columns", "label=label", "image=image", "--out", tmp_path / "b"]
    done = tool("encode_latents", *arguments, "--split", "test", *named)
    assert "2 samples of 3 classes" in done.stdout, done.stderr
    wrong = tool("encode_latents", *arguments, "--columns", "labels", "--out", tmp_path / "c")
    assert "'labels' is not image=, label= or text= and a name" in wrong.stderr
