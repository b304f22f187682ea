"""Small real data: shards (sample i is an array whose first number is i, its label i modulo 7),
photographs as files, an autoencoder with random weights.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe.data import fetching
from diffmoe.data.captions import Captions
from diffmoe.data.manifest import Manifest
from diffmoe.data.packing import ShardWriter
from diffmoe.files import sha256_of

FIELDS = {
    "content": "sample",
    "scaled": True,
    "shape": (2, 4, 4),
    "flips": False,
    "classes": 7,
    "autoencoder": "identity",
    "source": "tests",
}


def array_of(index: int, shape: tuple[int, ...], sign: int = 1) -> np.ndarray:
    array = np.random.default_rng(index).standard_normal(shape).astype(np.float32)
    array[0, 0, 0] = sign * index
    return array


def pack(
    directory: Path,
    counts: list[int],
    captions_of: Callable[[int], Captions | None] = lambda index: None,
    **changes,
) -> Manifest:
    """Shards of these counts; the mirrored array of sample i, if wanted, begins with -i."""
    writer = ShardWriter(directory, counts, **{**FIELDS, **changes})
    with writer:
        for i in range(sum(counts)):
            shape = writer.manifest.array_shape
            flip = array_of(i, shape, sign=-1) if writer.manifest.flips else None
            writer.add(f"{i:05d}", i % 7, array_of(i, shape), flip, captions_of(i))
    return writer.manifest


def relist(directory: Path) -> Manifest:
    """Take the shards as they are now for those that the manifest means."""
    manifest = Manifest.load(directory)
    for shard in manifest.shards:
        file = directory / shard.name
        shard.bytes, shard.sha256 = file.stat().st_size, sha256_of(file)
    manifest.save(directory)
    return manifest


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """No waiting between attempts."""
    monkeypatch.setattr(fetching, "BACK_OFF", 0.0)


@pytest.fixture(name="pack", scope="session")
def pack_fixture():
    return pack


@pytest.fixture
def fields():
    return dict(FIELDS)


def photograph(index: int, width: int = 24, height: int = 20) -> Image.Image:
    """Smooth colours with an edge; every index another picture, no two symmetric."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * x / width
    green = 255 * ((x + y + 7 * index) % height) / height
    blue = np.where(x > y, 200 - index, index)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """30 images in 3 class folders: JPEG and PNG, other modes, a subfolder, files to pass over."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(30):
        folder = root / ["cat", "Ant", "bee 2.0"][index % 3]
        if index == 4:
            folder = folder / "more"
        folder.mkdir(exist_ok=True, parents=True)
        image = photograph(index, 20 + index)
        if index in (5, 6, 7):
            image = image.convert({5: "L", 6: "CMYK", 7: "P"}[index])
        kind = "png" if index in (7, 8, 9) else "jpg" if index % 2 else "JPEG"
        image.save(folder / f"photo {index}.x.{kind}")
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "readme.md").write_text("beside the classes")
    return root


def build_vae(width: int = 8, **config):
    """A real AutoencoderKL with random weights: 16 pixels to a latent (4,8,8)."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra vae)")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(width, 2 * width),
        latent_channels=4,
        norm_num_groups=4,
        **config,
    )


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """Its folder, with a scale and a shift."""
    folder = tmp_path_factory.mktemp("vae")
    build_vae(scaling_factor=0.5, shift_factor=0.25).save_pretrained(folder)
    return folder


ROOT = Path(__file__).parents[2]


def tool(name: str, *arguments, **environment) -> subprocess.CompletedProcess:
    """Run tools/NAME.py as a user does."""
    return subprocess.run(
        [sys.executable, f"tools/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(name="tool", scope="session")
def tool_fixture():
    return tool


def members(directory: Path) -> dict[str, bytes]:
    """The bytes of every shard, by name."""
    return {file.name: file.read_bytes() for file in sorted(directory.glob("*.tar"))}
