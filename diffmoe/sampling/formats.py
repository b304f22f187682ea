"""Finished samples in other formats: PNG files, or the one npz of ADM's evaluator."""

import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from diffmoe.errors import UserError
from diffmoe.files import temporary_name
from diffmoe.sampling.many_images import shard_arrays


def write_png(folder: Path) -> Path:
    """One file per image, png/000000.png by its index. Returns the folder png/."""
    out = folder / "png"
    out.mkdir(exist_ok=True)
    index = 0
    for images, _ in shard_arrays(folder):
        for image in images:
            Image.fromarray(image.squeeze()).save(out / f"{index:06d}.png")
            index += 1
    return out


def write_adm(folder: Path, number: int, shape: tuple[int, int, int]) -> Path:
    """Write `samples_NxHxWx3.npz`: images `arr_0` (uint8) and labels `arr_1` (int64).

    One shard is in memory at a time. Raises UserError for gray images, which ADM does not take.
    """
    if shape[2] != 3:
        raise UserError(f"ADM's evaluator takes RGB images, these have {shape[2]} channel(s)")
    out = folder / f"samples_{number}x{shape[0]}x{shape[1]}x{shape[2]}.npz"
    temporary = temporary_name(out)
    labels = []
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (number, *shape)}
            np.lib.format.write_array_header_1_0(stream, header)
            for images, some in shard_arrays(folder):
                stream.write(np.ascontiguousarray(images).tobytes())
                labels.append(some)
        with archive.open("arr_1.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array(stream, np.concatenate(labels))
    os.replace(temporary, out)
    return out
