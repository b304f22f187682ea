"""Every kind of input gives its images exactly, or is refused by name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import batches, open_images
from diffmoe.evaluation.summary import summarize
from diffmoe.npz_files import npz_rows
from diffmoe.prepare.image_folders import find_images, load_image
from tests.helpers.pictures import extractor, not_a_number, pictures, write_files, write_samples
from tests.helpers.runs import pack

IMAGES = pictures(23)


def all_of(path, size: int = 4):
    parts = list(batches(open_images(path), size))
    assert max(len(part.images) for part in parts) <= size
    labels = [part.labels for part in parts]
    images = np.concatenate([part.images for part in parts])
    return images, None if labels[0] is None else np.concatenate(labels).tolist()


def test_samples_of_ours(tmp_path):
    folder = write_samples(tmp_path / "samples", IMAGES)
    images, labels = all_of(folder)
    assert np.array_equal(images, IMAGES)
    assert labels == [k % 5 for k in range(23)]
    about = open_images(folder).about
    assert about["kind"] == "samples"
    assert about["guidance"] == 1.5


def test_adm_npz_in_rows(tmp_path):
    file = tmp_path / "adm.npz"
    np.savez(file, arr_0=IMAGES, arr_1=np.arange(23))
    images, labels = all_of(file)
    assert np.array_equal(images, IMAGES)
    assert labels == list(range(23))
    assert [len(rows) for rows in npz_rows(file, "arr_0", 10)] == [10, 10, 3]
    np.savez_compressed(file, arr_0=IMAGES)
    assert np.array_equal(all_of(file)[0], IMAGES)
    assert all_of(file)[1] is None


def test_files_by_name_and_class(tmp_path):
    images, labels = all_of(write_files(tmp_path / "png", IMAGES, classes=2))
    assert np.array_equal(images, np.concatenate([IMAGES[::2], IMAGES[1::2]]))
    assert labels == [0] * 12 + [1] * 11


def test_shards_of_pixels_as_the_model_sees_them(tmp_path):
    pack(tmp_path / "data", shape=(3, 8, 8))
    images, labels = all_of(tmp_path / "data")
    assert images.shape[1:] == (8, 8, 3)
    assert images.dtype == np.uint8
    assert len(images) == len(labels) == open_images(tmp_path / "data").number
    assert images.std() > 10


def test_latents_are_no_images(tmp_path):
    pack(tmp_path / "data", shape=(3, 8, 8))
    file = tmp_path / "data" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"autoencoder": "sd-vae"}))
    with pytest.raises(UserError, match="holds latents of sd-vae, not pixels"):
        open_images(tmp_path / "data")


def test_fewer_and_more_than_asked_are_refused(tmp_path):
    images = open_images(write_samples(tmp_path / "samples", IMAGES))
    assert images.expect(23) is images
    assert images.expect(None) is images
    for number in (22, 24):
        with pytest.raises(
            UserError, match=f"holds 23 images, but exactly {number} were requested"
        ):
            images.expect(number)


def test_a_stale_file_is_refused(tmp_path):
    folder = write_samples(tmp_path / "samples", IMAGES)
    np.savez(folder / "samples-000099.npz", images=IMAGES)
    with pytest.raises(UserError, match=r"samples-000099\.npz is not listed"):
        open_images(folder)


def test_an_index_twice_is_refused(tmp_path):
    folder = write_samples(tmp_path / "samples", IMAGES)
    arrays = dict(np.load(folder / "samples-000001.npz"))
    np.savez(folder / "samples-000001.npz", **arrays | {"indices": arrays["indices"] - 7})
    with pytest.raises(UserError, match="holds 16 different of 23 samples"):
        open_images(folder)


def test_an_unfinished_or_damaged_folder_is_refused(tmp_path):
    folder = write_samples(tmp_path / "samples", IMAGES)
    file = folder / "samples-000001.npz"
    raw = bytearray(file.read_bytes())
    raw[200] ^= 1  # in the first image
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"samples-000001\.npz is missing or damaged"):
        all_of(folder)
    (folder / "samples.json").unlink()
    (folder / ".sampling").mkdir()
    with pytest.raises(UserError, match="not all samples are there"):
        open_images(folder)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": IMAGES.astype(np.float32)}, "holds float32; images are uint8"),
        ({"arr_0": IMAGES[:0]}, "holds no images"),
        ({"images": IMAGES}, "has no arr_0"),
        ({"arr_0": IMAGES[..., 0]}, r"shape \(8, 8\); extractors take RGB"),
        ({"arr_0": pictures(5, channels=1)}, r"shape \(8, 8, 1\); extractors take RGB"),
        ({"arr_0": pictures(5, channels=4)}, r"shape \(8, 8, 4\); extractors take RGB"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        summarize(open_images(tmp_path / "a.npz"), extractor())


def test_files_are_read_as_packing_reads_them(tmp_path):
    """Gray becomes RGB, what is transparent lies on a background, and the camera is turned."""
    place = tmp_path / "png"
    place.mkdir()
    Image.fromarray(IMAGES[0, ..., 0]).save(place / "0.png")
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(place / "1.png")
    Image.fromarray(IMAGES[1, ..., 0].astype(np.uint16) * 257).save(place / "2.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(IMAGES[2]).save(place / "3.png", exif=exif)
    for options, shade in [({}, 255), ({"background": (0, 0, 0)}, 0)]:
        images = open_images(place, **options)
        (part,) = images.parts()
        assert np.array_equal(part.images[0], IMAGES[0, ..., :1].repeat(3, 2))
        assert (part.images[1] == shade).all()
        assert np.array_equal(part.images[2], IMAGES[1, ..., :1].repeat(3, 2))
        assert np.array_equal(part.images[3], IMAGES[2, ::-1, ::-1])
        assert images.about.get("background") == options.get("background")
    items, _ = find_images(place.parent)
    for item, image in zip(items, part.images, strict=True):
        assert np.array_equal(load_image(item, 8, background=(0, 0, 0)), image)


def test_mixed_sizes_are_refused(tmp_path):
    write_files(tmp_path / "png", IMAGES)
    Image.new("RGB", (9, 8)).save(tmp_path / "png" / "class0" / "zzz.png")
    with pytest.raises(UserError, match="image 23 is 8x9x3, those before 8x8x3"):
        all_of(tmp_path / "png")


def test_damaged_missing_and_empty_input_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no images"):
        open_images(tmp_path / "empty")
    with pytest.raises(UserError, match=r"empyt does not exist \(did you mean .*empty\?\)"):
        open_images(tmp_path / "empyt")
    (tmp_path / "broken.npz").write_bytes(b"PK broken")
    with pytest.raises(UserError, match="is not a readable npz file"):
        open_images(tmp_path / "broken.npz")
    (tmp_path / "empty" / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 of 1 images of .*empty cannot be read: .*a\.png"):
        all_of(tmp_path / "empty")


def test_a_summary_is_that_of_all_images_in_any_batches(tmp_path):
    images = open_images(write_samples(tmp_path / "samples", IMAGES))
    small, large = (summarize(images, extractor(), batch) for batch in (3, 50))
    features = extractor()(torch.from_numpy(IMAGES))
    for found in (small, large):
        assert found.number == 23
        assert found.shape == (8, 8, 3)
        assert torch.allclose(found.features, features.pooled, rtol=1e-6)
        expected = np.cov(features.pooled.double().numpy(), rowvar=False)
        assert np.allclose(found.pooled.covariance, expected, rtol=1e-4)
        assert torch.allclose(found.spatial.mean, features.spatial.double().mean(0), rtol=1e-6)
        assert found.duplicates == 0
    assert torch.equal(
        summarize(images, extractor(), keep=5).features, features.pooled[[0, 4, 9, 13, 18]]
    )


def test_equal_images_are_counted(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.concatenate([IMAGES, IMAGES[:4]]))
    assert summarize(open_images(tmp_path / "a.npz"), extractor()).duplicates == 4


def test_features_that_are_no_numbers_are_refused_with_their_images(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=IMAGES)
    broken = extractor()._replace(
        features=lambda p: extractor().features(p)._replace(pooled=not_a_number(p))
    )
    with pytest.raises(UserError, match=r"images 0 to 9: extractor .*: pooled holds NaN"):
        summarize(open_images(tmp_path / "a.npz"), broken, batch=10)
