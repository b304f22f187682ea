"""The one reader of images: the bytes of a file in, what people see of it out, RGB with 8 bits.

The way up that EXIF names is applied and transparency is put on a background; gray values of 16
bits and floats are scaled, palettes and CMYK converted; of an animation the first frame is taken.
Color profiles are not applied.
"""

import io
from functools import cache

import numpy as np
from PIL import Image, ImageColor

from diffmoe.errors import UserError

# No others: Pillow would hand PostScript to Ghostscript, whatever the name of the file.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
WHITE = (255, 255, 255)

_ORIENTATION = 0x0112  # in EXIF
_BITS, _PHOTOMETRIC = 258, 262  # in TIFF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Color = tuple[int, int, int]


def color(name: str) -> Color:
    """A background as Pillow names it: "white", "#ffffff", "rgb(255,255,255)". Raises UserError."""
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        raise UserError(
            f"--background {name} is no color; give a name such as white, or #RRGGBB"
        ) from None


def decoded(data: bytes, background: Color = WHITE) -> Image.Image:
    """The image in the bytes of a file. Raises ValueError that says why there is none."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return _rgb(_upright(image), background)
    except Image.UnidentifiedImageError:
        raise ValueError(f"not one of {', '.join(FORMATS)}, or damaged") from None
    # Decoders raise what they like on damaged files: struct.error, SyntaxError, IndexError, ...
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says. A TIFF is already turned when it is loaded, and says so no more."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF: viewers show the image all the same
        return image
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image, background: Color) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """L, or LA, of gray values that are floats or wider integers."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    low, high = values.min(), values.max()
    if image.mode == "F":
        whole = high > 1 and np.array_equal(values, values.round())
        if not (low >= 0 and high <= (255 if whole else 1)):
            raise ValueError(
                f"floats from {low:g} to {high:g}; those from 0 to 1, or whole ones up to 255, "
                "are read as black to white"
            )
        levels = values.astype(np.uint8) if whole else np.round(values * 255).astype(np.uint8)
    elif low >= 0 and high <= 65535:
        levels = _levels(12 if tags.get(_BITS) == (12,) else 16)[values]
    else:
        raise ValueError(f"integers from {low} to {high}; those from 0 to 65535 are read")
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0; Pillow leaves it so
        levels = 255 - levels
    found = Image.fromarray(levels)
    if "transparency" in image.info:
        found.putalpha(Image.fromarray(values != image.info["transparency"]).convert("L"))
    return found


@cache
def _levels(bits: int) -> np.ndarray:
    """The nearest gray of 8 bits for every value of 16; those beyond `bits` are white."""
    values = np.arange(1 << 16) * 255 / ((1 << bits) - 1)
    return np.minimum(np.round(values), 255).astype(np.uint8)
