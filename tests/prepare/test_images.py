import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffmoe.errors import UserError
from diffmoe.prepare.image_folders import find_images, load_image
from diffmoe.prepare.images import center_crop


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
    with pytest.raises(UserError, match="nowhere is not a folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds 0 subfolders and 0 \.tar files"):
        find_images(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"class folder .*empty holds no image"):
        find_images(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 1 subfolders and 1 \.tar files"):
        find_images(tmp_path)
    (tmp_path / "empty").rmdir()
    with pytest.raises(UserError, match=r"a\.tar cannot be read: not a tar, or cut off"):
        find_images(tmp_path)


def test_crop_takes_the_middle_square_of_the_shorter_side():
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, 2:10] = np.arange(8)[:, None, None] * 10 + np.arange(8)[None, :, None]
    assert np.array_equal(center_crop(Image.fromarray(pixels), 8), pixels[:, 2:10])
    assert np.array_equal(
        center_crop(Image.fromarray(pixels.swapaxes(0, 1)), 8), pixels[:, 2:10].swapaxes(0, 1)
    )


def test_crop_halves_by_box_averages_first():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    averages = pixels.reshape(16, 2, 16, 2, 3).mean((1, 3))
    halved = center_crop(Image.fromarray(pixels), 16)
    assert np.abs(halved - averages).max() <= 1  # PIL rounds after each direction
    # 40 is less than twice 24: one bicubic step alone.
    large = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    bicubic = np.asarray(large.resize((24, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(center_crop(large, 24), bicubic)


@pytest.mark.parametrize("size", [(17, 16), (255, 31), (16, 16), (5, 9), (64, 33), (1, 20)])
def test_every_size_gives_the_wanted_square(size):
    assert center_crop(Image.new("RGB", size), 16).shape == (16, 16, 3)
