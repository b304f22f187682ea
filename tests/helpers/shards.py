"""Small real data: shards (sample i is an array whose first number is i, its label i modulo 7),
whole and damaged, photographs as files, an autoencoder with random weights.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe.data.captions import Captions
from diffmoe.data.manifest import Manifest, TextContent
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
    """Shards of these counts; the mirrored array of sample i, if wanted, begins with -i.

    The same holds for an image encoder's features, if wanted.
    """
    writer = ShardWriter(directory, counts, **{**FIELDS, **changes})
    with writer:
        for i in range(sum(counts)):
            shape = writer.manifest.array_shape
            flip = array_of(i, shape, sign=-1) if writer.manifest.flips else None
            content = writer.manifest.features
            signs = (1, -1)[: len(writer.manifest.feature_members)]
            features = [array_of(i, content.shape, sign).astype(np.float16) for sign in signs]
            writer.add(f"{i:05d}", i % 7, array_of(i, shape), flip, captions_of(i), features)
    return writer.manifest


NUMBERS = ["one", "two", "three"]


def captions_of(index: int) -> list[str]:
    """One to three captions of different lengths."""
    line = f"a red {NUMBERS[index % 3]}"
    return [line, f"{line} left of a blue one", NUMBERS[index % 3]][: 1 + index % 3]


def pack_captioned(directory: Path) -> Manifest:
    text = TextContent(encoder="bytes", length=40)
    return pack(directory, [9, 8], lambda index: Captions(captions_of(index)), text=text)


def damage(directory: Path, shard: int, how: str) -> None:
    """how: missing, truncated, empty, or flipped: one bit."""
    path = directory / f"{shard:06d}.tar"
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content[600] ^= 1
        path.write_bytes(content)


def relist(directory: Path) -> Manifest:
    """Take the shards as they are now for those that the manifest means."""
    manifest = Manifest.load(directory)
    for shard in manifest.shards:
        file = directory / shard.name
        shard.bytes, shard.sha256 = file.stat().st_size, sha256_of(file)
    manifest.save(directory)
    return manifest


def photograph(index: int, width: int = 24, height: int = 20) -> Image.Image:
    """Smooth colors with an edge; every index another picture, no two symmetric."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * x / width
    green = 255 * ((x + y + 7 * index) % height) / height
    blue = np.where(x > y, 200 - index, index)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


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


def members(directory: Path) -> dict[str, bytes]:
    """The bytes of every shard, by name."""
    return {file.name: file.read_bytes() for file in sorted(directory.glob("*.tar"))}
