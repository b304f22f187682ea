"""Class folders and tars as people have them: links, loops, permissions, names, things no image."""

import io
import os
import shutil
import tarfile
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import open_images
from diffmoe.prepare.image_folders import find_images, load_image
from tests.helpers.encoding import encode


@pytest.fixture
def root(tmp_path):
    """Two class folders of two PNGs each."""
    for number, name in enumerate(["cat/a", "cat/b", "dog/a", "dog/b"]):
        file = tmp_path / "images" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (60 * number, 10, 10)).save(file)
    return tmp_path / "images"


def names(root: Path) -> list[str]:
    return [item.name for item in find_images(root)[0]]


def pack(root: Path, out: Path, **options) -> Manifest:
    return encode(root, out, vae=None, size=8, shards=1, **options)


def test_classes_and_files_come_in_imagefolders_order(photos):
    items, classes = find_images(photos)
    assert classes == ["Ant", "bee 2.0", "cat"]  # upper case first, as Python sorts
    assert len(items) == 30
    assert [item.label for item in items] == [0] * 10 + [1] * 10 + [2] * 10
    first = [item.name for item in items[:10]]
    assert first[:2] == ["Ant/photo 1.x.jpg", "Ant/photo 10.x.JPEG"]
    assert first[-1] == "Ant/more/photo 4.x.JPEG"  # after the files of the folder above
    assert [item.key for item in items] == [f"{number:08d}" for number in range(30)]


def test_the_order_is_torchvisions_own(photos):
    folder = pytest.importorskip("torchvision.datasets").ImageFolder(photos)
    items, classes = find_images(photos)
    assert folder.classes == classes
    assert folder.samples == [(item.path, item.label) for item in items]


def test_every_mode_becomes_rgb(photos):
    for item in find_images(photos)[0]:
        pixels = load_image(item, 16)
        assert pixels.shape == (16, 16, 3)
        assert pixels.dtype == np.uint8
        assert pixels.std() > 5


def tar_of(photos, path, kinds=("jpg",), label=b"1"):
    with tarfile.open(path, "w") as tar:
        for index, item in enumerate(find_images(photos)[0][:3]):
            stream = io.BytesIO()
            Image.fromarray(load_image(item, 16)).save(stream, "png")
            members = [(kind, stream.getvalue()) for kind in kinds]
            for kind, content in [*members, *([("cls", label)] if label else [])]:
                info = tarfile.TarInfo(f"s{index}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_tars_give_the_images_of_the_folder(photos, tmp_path):
    tar_of(photos, tmp_path / "b.tar", kinds=("png",))
    tar_of(photos, tmp_path / "a.tar", kinds=("png",), label=b"7")
    items, classes = find_images(tmp_path)
    assert classes is None
    assert [item.name for item in items] == [f"{t}.tar/s{i}" for t in "ab" for i in range(3)]
    assert [item.label for item in items] == [7, 7, 7, 1, 1, 1]
    for item, file in zip(items[3:], find_images(photos)[0], strict=False):
        assert np.array_equal(load_image(item, 16), load_image(file, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ()}, r"a\.tar/s0 has 0 images"),
        ({"kinds": ("jpg", "png")}, r"a\.tar/s0 has 2 images"),
        ({"label": None}, r"a\.tar/s0\.cls holds None, not a class number"),
        ({"label": b"cat"}, r"holds b'cat'"),
    ],
)
def test_tars_that_do_not_fit_are_named(photos, tmp_path, options, message):
    tar_of(photos, tmp_path / "a.tar", **options)
    with pytest.raises(UserError, match=message):
        find_images(tmp_path)


def test_folders_that_do_not_fit_are_named(photos, tmp_path):
    (tmp_path / "somewhere").touch()
    with pytest.raises(UserError, match=r"nowhere does not exist \(did you mean .*/somewhere\?\)"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="somewhere is not a folder"):
        find_images(tmp_path / "somewhere")
    (tmp_path / "somewhere").unlink()
    with pytest.raises(UserError, match="holds 0 subfolders, 0 tar files and 0 images"):
        find_images(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"class folder .*empty holds no image"):
        find_images(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match="holds 1 subfolders, 1 tar files and 0 images"):
        find_images(tmp_path)
    (tmp_path / "empty").rmdir()
    with pytest.raises(UserError, match=r"a\.tar cannot be read: not a tar, or cut off"):
        find_images(tmp_path)


def test_a_flat_folder_is_one_class(root, tmp_path):
    flat = tmp_path / "My cats"
    flat.mkdir()
    for number, item in enumerate(find_images(root)[0]):
        shutil.copy(item.path, flat / f"IMG {number}.PNG")
    (flat / "notes.txt").write_text("not an image")
    items, classes = find_images(flat)
    assert classes == ["My cats"]
    assert [(item.name, item.label) for item in items] == [(f"IMG {n}.PNG", 0) for n in range(4)]
    manifest = pack(flat, tmp_path / "out")
    assert (manifest.samples, manifest.classes, manifest.class_names) == (4, 1, ["My cats"])
    (flat / "more").mkdir()  # or would all but its images be lost?
    with pytest.raises(UserError, match="holds 1 subfolders, 0 tar files and 4 images; it must"):
        find_images(flat)


def test_rarer_endings_are_read_and_what_cannot_be_is_named(root, tmp_path):
    for name in ("a.jfif", "b.JPE"):
        Image.new("RGB", (8, 8)).save(root / "cat" / name, "jpeg")
    (root / "cat" / "c.jxl").write_bytes(b"\xff\x0a" + bytes(40))
    manifest = pack(root, tmp_path / "out")
    assert manifest.samples == 6
    (skipped,) = manifest.skipped
    assert skipped.startswith("cat/c.jxl: ValueError: not one of JPEG, ")


def test_a_phones_image_without_its_plugin_is_named(root, tmp_path):
    (root / "cat" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    manifest = pack(root, tmp_path / "out")
    assert manifest.samples == 4
    assert manifest.skipped[0].startswith("cat/IMG_1.HEIC: ValueError: ")


def test_links_that_lead_out_are_followed_if_told_and_by_evaluation(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (root / "dog").rename(tmp_path / "elsewhere" / "dogs")
    (root / "dog").symlink_to(tmp_path / "elsewhere" / "dogs", target_is_directory=True)
    (root / "cat" / "b.png").rename(tmp_path / "elsewhere" / "b.png")
    (root / "cat" / "b.png").symlink_to("../../elsewhere/b.png")
    items, _ = find_images(root, follow_links=True)
    assert [item.name for item in items] == ["cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png"]
    assert pack(root, tmp_path / "out", follow_links=True).samples == 4
    parts = list(open_images(root).parts())
    assert np.concatenate([part.images for part in parts])[:, 0, 0, 0].tolist() == [0, 60, 120, 180]
    assert np.concatenate([part.labels for part in parts]).tolist() == [0, 0, 1, 1]
    for link in ("dog", "cat/b.png"):  # each alone is refused: somebody else may have made it
        message = rf"{link} is a link that leads out of .*, to .*elsewhere.*--follow-links"
        with pytest.raises(UserError, match=message):
            find_images(root)
        (root / link).unlink()
        (root / link).with_suffix("").mkdir(exist_ok=True)


@pytest.mark.parametrize("read", [partial(find_images, follow_links=True), open_images])
@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("cat/loop", ".", r"cat/loop links back to .*cat"),
        ("cat/up", "../..", r"links back to"),
        ("dog/pair", "../cat", None),  # twice the same, but no end without a loop
        ("cat/itself", "itself", r"cat/itself is a broken link"),
        ("dog/more", "/nowhere/at/all", r"dog/more is a broken link"),
        ("bird", "/nowhere/at/all", r"bird is a broken link"),
    ],
)
def test_loops_and_links_to_nowhere_are_named(root, read, link, target, message):
    (root / link).symlink_to(target)
    if message is None:
        assert len(find_images(root)[0]) == 6
        assert open_images(root).number == 6
        return
    with pytest.raises(UserError, match=message):
        read(root)


def test_two_links_that_lead_to_each_other_are_named(root):
    (root / "cat" / "d").symlink_to("../dog")
    (root / "dog" / "c").symlink_to("../cat")
    with pytest.raises(UserError, match="links back to"):
        find_images(root)


@pytest.mark.timeout(60)
def test_fifos_devices_endless_files_and_dangling_links_are_skipped_by_name(root, tmp_path):
    os.mkfifo(root / "cat" / "fifo.png")
    (root / "cat" / "gone.png").symlink_to("/nowhere.png")
    (root / "cat" / "zero.png").symlink_to("/dev/zero")
    (root / "dog" / "folder.png").mkdir()
    with open(root / "dog" / "sparse.png", "wb") as stream:
        stream.truncate(1 << 40)
    manifest = pack(root, tmp_path / "out", follow_links=True)
    assert manifest.samples == 4
    skipped = dict(line.split(": ", 1) for line in manifest.skipped)
    assert sorted(skipped) == ["cat/fifo.png", "cat/gone.png", "cat/zero.png", "dog/sparse.png"]
    assert "not a regular file" in skipped["cat/fifo.png"]
    assert "not a regular file" in skipped["cat/zero.png"]
    assert "No such file" in skipped["cat/gone.png"]
    assert "1,099,511,627,776 bytes" in skipped["dog/sparse.png"]
    # Figures need every image: evaluation names them all at once.
    with pytest.raises(UserError, match=r"4 of 8 images .*fifo\.png.*gone\.png.*zero\.png.* and 1"):
        list(open_images(root).parts())


@pytest.mark.timeout(60)
def test_captions_and_tars_that_are_no_files_do_not_hang(root, tmp_path):
    for name in ("cat/a", "cat/b", "dog/a"):
        (root / name).with_suffix(".txt").write_text("a picture")
    os.mkfifo(root / "dog" / "b.txt")
    manifest = pack(root, tmp_path / "out", captioned=True)
    assert manifest.samples == 3
    assert "dog/b.png" in manifest.skipped[0]
    assert "not a regular file" in manifest.skipped[0]
    (tmp_path / "tars").mkdir()
    os.mkfifo(tmp_path / "tars" / "a.tar")
    with pytest.raises(UserError, match=r"a\.tar cannot be read: .*it is a pipe"):
        find_images(tmp_path / "tars")


def test_a_giant_member_of_a_sparse_tar_is_skipped(root, tmp_path):
    place = tmp_path / "tars"
    place.mkdir()
    image = (root / "cat" / "a.png").read_bytes()
    with open(place / "a.tar", "wb") as stream:
        for name, size, content in [("a.png", len(image), image), ("b.png", 6 << 30, b"")]:
            for member, length, data in [(name, size, content), (name[0] + ".cls", 1, b"0")]:
                info = tarfile.TarInfo(member)
                info.size = length
                stream.write(info.tobuf(tarfile.GNU_FORMAT))
                start = stream.tell()
                stream.write(data)
                stream.seek(start + -(-length // 512) * 512)
        stream.truncate(stream.tell() + 1024)
    manifest = pack(place, tmp_path / "out", classes=1)
    assert manifest.samples == 1
    assert "a.tar/b: ValueError: 6,442,450,944 bytes" in manifest.skipped[0]


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_what_may_not_be_read_is_named():
    """As nobody, in a folder that nobody may enter."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name in ("closed", "open", "open/below"):
            (root / name).mkdir()
            Image.new("RGB", (8, 8)).save(root / name / "a.png")
        (root / "closed").chmod(0o000)
        os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=r"closed cannot be listed: Permission denied"):
                find_images(root)
            with pytest.raises(UserError, match=r"closed cannot be listed: Permission denied"):
                open_images(root)
            os.seteuid(0)
            (root / "closed").chmod(0o755)
            (root / "closed" / "a.png").chmod(0o000)
            (root / "open").chmod(0o744)  # names can be listed, but nothing entered
            os.seteuid(65534)
            with pytest.raises(UserError, match=r"open/below cannot be listed: Permission denied"):
                find_images(root)
            os.seteuid(0)
            (root / "open").chmod(0o755)
            os.seteuid(65534)
            closed = find_images(root)[0][0]
            with pytest.raises(OSError, match="Permission denied"):
                load_image(closed, 8)
        finally:
            os.seteuid(0)


def test_names_that_are_no_utf8_are_shown_with_escapes(root, tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    (root / "cat").rename(root / odd)
    (root / odd / "b.png").rename(root / odd / f"{odd}.png")
    (root / odd / "bad\x1b.png").write_bytes(b"no image")
    manifest = pack(root, tmp_path / "out")
    assert manifest.class_names == ["caf\\udce9", "dog"]
    [skipped] = manifest.skipped
    assert skipped.startswith("caf\\udce9/bad\\x1b.png: ValueError: not one of JPEG, PNG, ")
    assert Manifest.load(tmp_path / "out") == manifest
    assert manifest.samples == 4
    assert pack(root, tmp_path / "out") == manifest  # goes on where it was


def test_names_in_tars_that_are_no_utf8_are_shown_with_escapes(root, tmp_path):
    place = tmp_path / os.fsdecode(b"t\xe4rs")
    place.mkdir()
    with tarfile.open(place / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in [("ü.png", b"no image"), ("ü.cls", b"0"), ("v.cls", b"0")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            if name == "v.cls":
                image = (root / "cat" / "a.png").read_bytes()
                info = tarfile.TarInfo("v.png")
                info.size = len(image)
                tar.addfile(info, io.BytesIO(image))
    manifest = pack(place, tmp_path / "out", classes=1)
    assert manifest.samples == 1
    assert manifest.skipped[0].startswith("a.tar/\\udcfc: ValueError: not one of")
    assert "t\\udce4rs" in manifest.source


def test_an_animation_by_the_name_of_gif_is_found(root, tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime")]
    frames[0].save(root / "dog" / "c.gif", save_all=True, append_images=frames[1:])
    assert names(root)[-1] == "dog/c.gif"
    assert load_image(find_images(root)[0][-1], 8)[0, 0].tolist() == [255, 0, 0]
