"""From the bytes of an image file to 8-bit RGB as viewers show it, and to DiT's square crop.

EXIF orientation is applied and transparency is composited on a background; 16-bit and float grays
are scaled, palettes and CMYK converted; of an animation the first frame is used. AVIF and HEIC
are read if Pillow has what they need. Color profiles are not applied.
"""

import io
from functools import cache

import numpy as np
from PIL import Image, ImageColor, features

from diffmoe.config import Size, sides
from diffmoe.errors import UserError

try:
    from pillow_heif import register_heif_opener
except ImportError:
    _HAS_HEIF = False
else:
    register_heif_opener()
    _HAS_HEIF = True

# No others: Pillow would pass PostScript to Ghostscript, whatever the file is called.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
# An older Pillow warns when it is asked for AVIF.
_HAS_AVIF = "avif" in features.modules and features.check("avif")
_INSTALLED = (*FORMATS, *(["AVIF"] if _HAS_AVIF else []), *(["HEIF"] if _HAS_HEIF else []))
# The bytes 4 to 12 of a file, and what a format needs.
_BRANDS = {
    **dict.fromkeys((b"ftypavif", b"ftypavis"), "AVIF"),
    **dict.fromkeys((b"ftypheic", b"ftypheix", b"ftypheim", b"ftypheis", b"ftypmif1"), "HEIF"),
}
_NEEDS = {"AVIF": "Pillow 11.3 or newer", "HEIF": 'pip install "diffmoe[heic]"'}
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


def parse_color(name: str) -> Color:
    """A color in Pillow's spelling: "white", "#ffffff", "rgb(255,255,255)". Raises UserError."""
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        raise UserError(
            f"--background {name} is not a color; give a name such as white, or #RRGGBB"
        ) from None


def decode_image(data: bytes, background: Color = WHITE) -> Image.Image:
    """The RGB image in the bytes of a file. Raises ValueError with the reason if there is none."""
    if not data:
        raise ValueError("it is empty, without the bytes of an image")
    try:
        with Image.open(io.BytesIO(data), formats=_INSTALLED) as image:
            image.load()
            return _rgb(_upright(image), background)
    except Image.UnidentifiedImageError:
        kind = _BRANDS.get(data[4:12])
        if kind is not None and kind not in _INSTALLED:
            raise ValueError(f"{kind} needs {_NEEDS[kind]}") from None
        raise ValueError(f"not one of {', '.join(_INSTALLED)}, or damaged") from None
    # On damaged files decoders raise anything: struct.error, SyntaxError, IndexError, ...
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(kind + " ".join(str(error).split())) from None


def center_crop(image: Image.Image, size: Size) -> np.ndarray:
    """The center crop of ADM and DiT (center_crop_arr), uint8 (height,width,3).

    The image is halved by box averaging while it is at least twice as large, then resized
    bicubically so that it covers `size` and one side fits; the other side is cropped evenly.
    """
    height, width = sides(size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    resized = (round(image.width * scale), round(image.height * scale))
    pixels = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Pillow has already done so for a TIFF, and removed the tag."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF: viewers show the image anyway
        return image
    turn = None if orientation is None else _UPRIGHT.get(orientation)
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
    """Float or wide-integer grays as L, or as LA where one gray is marked transparent."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    low, high = values.min(), values.max()
    if image.mode == "F":
        whole = high > 1 and np.array_equal(values, values.round())
        if not (low >= 0 and high <= (255 if whole else 1)):
            raise ValueError(
                f"floats from {low:g} to {high:g}; only 0 to 1, or whole numbers up to 255, can "
                "be read as black to white"
            )
        levels = values.astype(np.uint8) if whole else np.round(values * 255).astype(np.uint8)
    elif low >= 0 and high <= 65535:
        levels = _levels(12 if tags.get(_BITS) == (12,) else 16)[values]
    else:
        raise ValueError(f"integers from {low} to {high}; only 0 to 65535 can be read")
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0; Pillow does not invert it
        levels = 255 - levels
    found = Image.fromarray(levels)
    if "transparency" in image.info:
        found.putalpha(Image.fromarray(values != image.info["transparency"]).convert("L"))
    return found


@cache
def _levels(bits: int) -> np.ndarray:
    """The nearest 8-bit gray of each 16-bit value; values that exceed `bits` are white."""
    values = np.arange(1 << 16) * 255 / ((1 << bits) - 1)
    return np.minimum(np.round(values), 255).astype(np.uint8)
