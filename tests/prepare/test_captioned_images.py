"""Images with captions in files beside them, or in tars, into shards that carry both."""

import tarfile

import numpy as np
import pytest
import torch

from diffmoe.data.autoencoders import PixelAutoencoder
from diffmoe.data.fetching import open_shard
from diffmoe.data.latents import from_stored
from diffmoe.data.manifest import TextContent
from diffmoe.data.reading import OpenShard
from diffmoe.errors import UserError
from diffmoe.prepare.image_folders import find_images, load_image
from diffmoe.recipes import load_config
from diffmoe.training import preflight
from tests.helpers.encoding import encode
from tests.helpers.shards import members, photograph


def lines_of(index: int) -> list[str]:
    return [f"picture {index}", f"Bild Nummer {index}, grün"][: 1 + index % 2]


@pytest.fixture
def folder(tmp_path):
    """Six pictures, in the folder itself and one below; the first caption file ends in blanks."""
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for index in range(6):
        place = root / "more" if index > 3 else root
        photograph(index).save(place / f"photo.{index}.png")
        text = "\n".join(lines_of(index)) + ("\n\n  \n" if index == 0 else "")
        (place / f"photo.{index}.txt").write_text(text, encoding="utf-8")
    return root


def pack(root, out, **options):
    return encode(
        root, out, **{"vae": None, "size": 16, "shards": 2, "captioned": True, "batch": 2} | options
    )


def captions_in(directory, manifest) -> dict[str, list[str]]:
    found = {}
    for shard in manifest.shards:
        address = manifest.address(directory, shard)
        opened = OpenShard(open_shard(address, shard, attempts=1), shard, manifest, address)
        for index, key in enumerate(opened.keys):
            values = torch.from_numpy(from_stored(opened.array(index), manifest.dtype))
            image = PixelAutoencoder().decode(values[None])
            found[key] = (opened.captions(index).lines, image[0].numpy())
        opened.close()
    return found


def test_captions_stay_with_their_images(folder, tmp_path):
    manifest = pack(folder, tmp_path / "out")
    assert (manifest.classes, manifest.class_names) == (1, None)
    assert manifest.text == TextContent(encoder="bytes", length=256)
    items, names = find_images(folder, captioned=True)
    assert names is None
    assert len(items) == 6
    found = captions_in(tmp_path / "out", manifest)
    for item in items:
        lines, image = found[item.key]
        assert lines == lines_of(int(item.name.split(".")[1]))
        assert np.array_equal(image, load_image(item, 16))


def test_tars_give_the_same_shards(folder, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "0.tar", "w") as tar:
        for number, item in enumerate(find_images(folder, captioned=True)[0]):
            tar.add(item.path, f"{number}.png")
            tar.add(item.path.replace(".png", ".txt"), f"{number}.txt")
    pack(folder, tmp_path / "a")
    pack(tars, tmp_path / "b")
    assert members(tmp_path / "a") == members(tmp_path / "b")


def test_an_image_without_captions_is_skipped_and_told(folder, tmp_path):
    (folder / "photo.1.txt").unlink()
    (folder / "photo.2.txt").write_text(" \n")
    manifest = pack(folder, tmp_path / "out")
    assert manifest.samples == 4
    told = sorted(manifest.skipped)
    assert told[0].startswith("photo.1.png: FileNotFoundError")
    assert told[1] == "photo.2.png: ValueError: txt contains no caption"
    with pytest.raises(UserError, match="than --max-bad allows"):
        pack(folder, tmp_path / "strict", max_bad=1)


@pytest.mark.slow
def test_the_command(folder, tmp_path, tool):
    arguments = ["--images", folder, "--pixels", "--size", 16, "--shards", 2, "--captions"]
    done = tool("encode_latents", *arguments, "--out", tmp_path / "out")
    assert "6 samples with captions in 2 shards" in done.stdout, done.stderr
    *_, following = done.stdout.splitlines()
    assert following == (
        f"next: python train.py --config captioned_digits data.path={tmp_path / 'out'} "
        "model.input_size=16 model.text.length=256 data.lanes=2 output=runs/out"
    )
    config = load_config("captioned_digits", following.split()[5:])
    assert preflight.check_data(config).samples == 6
