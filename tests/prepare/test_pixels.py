"""Pixels are stored as they are, one byte each and once; the mirror image is made when read."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch

from diffmoe.data.autoencoders import to_uint8
from diffmoe.data.captions import Captions
from diffmoe.data.latents import from_stored, model_latents, to_stored
from diffmoe.data.manifest import Manifest, TextContent
from diffmoe.data.packing import ShardWriter
from diffmoe.data.reading import read_shard
from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import open_images
from diffmoe.prepare.checking import check_data
from diffmoe.prepare.resharding import reshard
from diffmoe.prepare.sharding import ShardOutput
from tests.helpers.encoding import encode
from tests.helpers.shards import FIELDS, members
from tests.helpers.streams import RAGGED, batches

IMAGES = np.random.default_rng(0).integers(0, 256, (sum(RAGGED), 3, 8, 8), np.uint8)
PIXELS = FIELDS | {"shape": (3, 8, 8), "flips": True}


def write(directory, dtype: str, mirrored: str, **changes) -> Manifest:
    """IMAGES, as the packing of today or of before would have them."""
    arrays = IMAGES if dtype == "uint8" else (IMAGES / 127.5 - 1).astype(dtype)
    fields = PIXELS | {"dtype": dtype, "mirrored": mirrored} | changes
    with ShardWriter(directory, RAGGED, **fields) as writer:
        for index, array in enumerate(arrays):
            flip = array[..., ::-1] if mirrored == "stored" else None
            captions = Captions([f"image {index}"]) if "text" in fields else None
            writer.add(f"{index:03d}", index % 7, array, flip, captions)
    return writer.manifest


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """uint8 mirrored on reading, and the float16 with mirror images of before."""
    root = tmp_path_factory.mktemp("pixels")
    return {
        "new": (root / "new", write(root / "new", "uint8", "on_reading")),
        "old": (root / "old", write(root / "old", "float16", "stored")),
    }


def test_images_are_packed_as_bytes_without_their_mirror_images(photos, tmp_path):
    manifest = encode(photos, tmp_path, vae=None, size=16, shards=2)
    assert (manifest.dtype, manifest.flips, manifest.mirrored) == ("uint8", True, "on_reading")
    assert manifest.version == 2
    with tarfile.open(tmp_path / "000000.tar") as tar:
        kinds = {name.split(".", 1)[1] for name in tar.getnames()}
        name = next(name for name in tar.getnames() if name.endswith("npy"))
        array = np.load(io.BytesIO(tar.extractfile(name).read()))
    assert kinds == {"cls", "latent.npy"}
    assert (array.dtype, array.shape) == (np.uint8, (3, 16, 16))


def test_every_byte_is_the_number_that_float16_pixels_round():
    levels = np.arange(256, dtype=np.uint8)
    values = from_stored(levels, "uint8")
    assert values.dtype == np.float32
    assert (values[0], values[255]) == (-1, 1)
    assert np.abs(values - (levels / 127.5 - 1)).max() < 1e-7
    # Exactly what a float16 file of the same pixels would hold, but not rounded to it.
    assert np.array_equal(to_stored(values, "float16"), (levels / 127.5 - 1).astype(np.float16))
    assert np.array_equal(to_stored(values, "uint8"), levels)
    assert np.array_equal(to_uint8(torch.from_numpy(values).view(1, 1, 1, 256)).flatten(), levels)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_that_of_float16_with_stored_mirror_images(folders, workers):
    """Order, mirroring and draws alike; numbers apart by float16's rounding, half of 2^-11."""
    new, old = (batches(*folders[name], workers=workers) for name in ("new", "old"))
    mirrored = 0
    for ours, theirs in zip(new, old, strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.latents.half(), theirs.latents.half())
        assert 0 < (ours.latents - theirs.latents).abs().max() <= 2**-12
        for image in to_uint8(ours.latents).permute(0, 3, 1, 2).numpy():
            mirrored += (IMAGES[..., ::-1] == image).all((1, 2, 3)).any()
    drawn = sum(len(batch.labels) for batch in new)
    assert drawn / 3 < mirrored < drawn * 2 / 3


def test_what_is_read_is_the_image_and_its_mirror_image(folders):
    directory, manifest = folders["new"]
    number = 0
    for shard in manifest.shards:
        for sample in read_shard(directory / shard.name, manifest):
            assert np.array_equal(sample.array, IMAGES[number])
            assert np.array_equal(sample.flip, IMAGES[number][..., ::-1])
            number += 1
    assert number == len(IMAGES)


def test_every_reader_of_shards_knows_them(folders, tmp_path):
    directory, manifest = folders["new"]
    made = reshard(directory, ShardOutput(tmp_path / "resharded", shards=3))
    assert (made.dtype, made.mirrored, made.version) == ("uint8", "on_reading", 2)
    assert sum(shard.bytes for shard in made.shards) < 1.1 * sum(s.bytes for s in manifest.shards)
    images = np.concatenate([part.images for part in open_images(directory).parts()])
    assert np.array_equal(images, IMAGES.transpose(0, 2, 3, 1))
    report = check_data(directory, tmp_path / "sheet.png")
    assert report.problems == []
    assert "content sample of 3x8x8 in uint8, flips True (mirrored on reading)" in str(report)
    old = check_data(folders["old"][0], None)
    assert "in float16, flips True, scaled" in str(old)
    text = TextContent(encoder="bytes", length=9)
    captioned = write(tmp_path / "captioned", "uint8", "on_reading", classes=7, text=text)
    assert (
        reshard(tmp_path / "captioned", ShardOutput(tmp_path / "again", shards=2)).samples
        == captioned.samples
    )
    (batch,) = batches(tmp_path / "captioned", captioned, steps=1, captions=True)
    assert batch.text.tokens.shape == (len(batch.labels), 9)


def test_manifests_of_before_are_read_and_written_as_they_were(folders):
    """Version 1, to the byte: what does not use the new fields does not show them."""
    directory, manifest = folders["old"]
    there = json.loads((directory / "manifest.json").read_text())
    assert there["version"] == 1
    assert "mirrored" not in there
    assert Manifest.load(directory) == manifest
    assert Manifest.load(directory).mirrored == "stored"
    assert json.loads((folders["new"][0] / "manifest.json").read_text())["mirrored"] == "on_reading"


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "uint8"}, {"mirrored": "on_reading"}],
)
@pytest.mark.parametrize("kind", [{"autoencoder": "some/vae"}, {"content": "mean_std"}])
def test_latents_are_neither_bytes_nor_mirrored_when_read(tmp_path, fields, kind, changes):
    with pytest.raises(ValueError, match="are for pixels only"):
        Manifest(shards=[], **fields | kind | changes)
    Manifest(shards=[], **fields | changes)


def test_bytes_are_no_type_for_an_autoencoder(photos, tmp_path):
    with pytest.raises(UserError, match="--dtype uint8 is for --pixels"):
        encode(photos, tmp_path, vae="some/vae", size=16, dtype="uint8")


def test_pixels_may_still_be_floats_and_then_are_mirrored_when_read(photos, tmp_path):
    manifest = encode(photos, tmp_path, vae=None, size=16, shards=2, dtype="float16")
    assert (manifest.dtype, manifest.mirrored) == ("float16", "on_reading")
    (a, b) = batches(tmp_path, manifest, steps=2, lanes=2)
    assert a.latents.abs().max() <= 1
    encode(photos, tmp_path / "bytes", vae=None, size=16, shards=2)
    (c, d) = batches(tmp_path / "bytes", Manifest.load(tmp_path / "bytes"), steps=2, lanes=2)
    assert torch.equal(a.latents, c.latents.half().float())
    assert torch.equal(b.latents, d.latents.half().float())


def test_scale_and_shift_still_apply(fields):
    """Of pixels that a manifest says are unscaled."""
    manifest = Manifest(
        shards=[], **fields | {"dtype": "uint8", "scaled": False, "scale": 0.5, "shift": 1.0}
    )
    z = model_latents([np.full((2, 4, 4), 255, np.uint8)], manifest, torch.Generator())
    assert z.unique().tolist() == [0.0]


def test_shards_are_the_same_bytes_every_time(tmp_path):
    write(tmp_path / "a", "uint8", "on_reading")
    write(tmp_path / "b", "uint8", "on_reading")
    assert members(tmp_path / "a") == members(tmp_path / "b")
