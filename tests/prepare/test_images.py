"""The one reader of images: real files of every kind, as people see them; the square cut out."""

import io
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffmoe.errors import UserError
from diffmoe.prepare import images
from diffmoe.prepare.images import center_crop, decode_image, parse_color

RNG = np.random.default_rng(0)
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4  # 0, 4, ... 252
SIXTEEN = RAMP.astype(np.uint16) * 257  # the same grays with 16 bits


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(data: bytes, **options) -> np.ndarray:
    image = decode_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def gray(data: bytes) -> np.ndarray:
    """Of an image that must come out gray: one of its three equal channels."""
    found = pixels(data)
    assert np.array_equal(found[..., 0], found[..., 1])
    assert np.array_equal(found[..., 0], found[..., 2])
    return found[..., 0]


# What a camera that is held so (EXIF 0x0112) stores of an upright picture.
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def heif() -> None:
    """Skip without the extra heic, which decode_image then does without, too."""
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed (extra heic)")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG", "AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(kind, orientation):
    """Four flat quarters of other colors, on a picture wider than high."""
    if kind == "HEIF":  # which turns by its own fields; its plugin writes them from EXIF
        heif()
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, 16:], upright[8:, :16], upright[8:, 16:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(TURNED[orientation](upright)))
    best = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 100, "subsampling": 0},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
        "HEIF": {"quality": 100, "chroma": 444},
    }
    found = pixels(saved(stored, kind, exif=exif.tobytes(), **best.get(kind, {})))
    assert found.shape == upright.shape
    lossy = {"JPEG": 4, "AVIF": 4, "HEIF": 12}
    assert np.abs(found.astype(int) - upright).max() <= lossy.get(kind, 0)


def test_broken_exif_does_not_cost_the_image():
    picture = Image.fromarray(RAMP)
    whole = saved(picture, "JPEG", exif=b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff" + b"\xff" * 40)
    assert np.array_equal(pixels(whole), pixels(saved(picture, "JPEG")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(kind):
    assert np.array_equal(gray(saved(Image.fromarray(SIXTEEN), kind)), RAMP)
    # Between two grays of 8 bits the nearer one is taken.
    near = np.array([[0, 128, 129, 385, 386, 65535 - 128, 65535]], np.uint16)
    assert gray(saved(Image.fromarray(near), kind)).tolist() == [[0, 0, 1, 1, 2, 255, 255]]


def test_colors_of_sixteen_bits_are_scaled():
    """Which Pillow reads, and does not write."""
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in SIXTEEN)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        png += struct.pack(">I", len(content)) + kind + content + checksum
    assert np.array_equal(gray(png), RAMP)


def test_big_endian_and_white_is_zero_are_understood():
    big = saved(Image.frombytes("I;16B", (8, 8), SIXTEEN.astype(">u2").tobytes()), "TIFF")
    assert np.array_equal(gray(big), RAMP)
    white_is_zero = saved(Image.fromarray(65535 - SIXTEEN), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(gray(white_is_zero), RAMP)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (RAMP.astype(np.float32) / 255, RAMP),  # 0..1
        (RAMP.astype(np.float32), RAMP),  # whole numbers, as 8 bits hold them
        (SIXTEEN.astype(np.int32), RAMP),  # 32 bits that hold 16
        (np.eye(8, dtype=np.float32), np.eye(8, dtype=np.uint8) * 255),
    ],
)
def test_floats_and_wide_integers_are_scaled(values, wanted):
    assert np.array_equal(gray(saved(Image.fromarray(values), "TIFF")), wanted)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0.0, 1.5]]), r"^floats from 0 to 1\.5"),
        (np.array([[-0.5, 1.0]]), r"floats from -0\.5 to 1"),
        (np.array([[np.nan, 1.0]]), "floats from nan to nan"),
        (np.array([[0.0, 256.0]]), "floats from 0 to 256"),
        (np.array([[0, 65536]], np.int32), "integers from 0 to 65536"),
        (np.array([[-1, 5]], np.int32), "integers from -1 to 5"),
    ],
)
def test_numbers_that_may_mean_anything_are_no_image(values, message):
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    with pytest.raises(ValueError, match=message):
        decode_image(saved(Image.fromarray(values), "TIFF"))


def test_colors_under_alpha_are_hidden():
    alpha = RNG.integers(0, 256, (8, 8), np.uint8)
    alpha[0], alpha[1] = 0, 255
    colors = RNG.integers(0, 256, (8, 8, 3), np.uint8)
    data = saved(Image.fromarray(np.dstack([colors, alpha])), "PNG")
    for background in [(255, 255, 255), (0, 0, 0), (10, 200, 30)]:
        share = alpha[..., None] / 255
        wanted = colors * share + np.array(background) * (1 - share)
        found = pixels(data, background=background)
        assert np.abs(found - wanted).max() <= 1  # Pillow's rounding
        assert (found[0] == background).all()
        assert np.array_equal(found[1], colors[1])
    assert np.array_equal(pixels(data), pixels(data, background=(255, 255, 255)))


def test_every_way_to_be_transparent_is_put_on_white():
    grays = Image.fromarray(RAMP)
    with_alpha = grays.copy()
    with_alpha.putalpha(0)  # LA
    palette = Image.fromarray(np.eye(8, dtype=np.uint8), "P")
    palette.putpalette([9, 9, 9, 200, 10, 20])
    on_white = np.full((8, 8, 3), 255, np.uint8)
    on_white[np.eye(8, dtype=bool)] = (200, 10, 20)
    assert (pixels(saved(with_alpha, "PNG")) == 255).all()
    for kind in ("PNG", "GIF"):
        assert np.array_equal(pixels(saved(palette, kind, transparency=0)), on_white)
    assert np.array_equal(pixels(saved(palette, "PNG", transparency=b"\0\xff")), on_white)
    for data in (
        saved(grays, "PNG", transparency=8),
        saved(grays.convert("RGB"), "PNG", transparency=(8, 8, 8)),
        saved(Image.fromarray(SIXTEEN), "PNG", transparency=8 * 257),
    ):
        found = gray(data)
        assert np.array_equal(found[RAMP != 8], RAMP[RAMP != 8])
        assert (found[RAMP == 8] == 255).all()


def test_cmyk_palettes_and_bits_are_converted():
    red = Image.new("RGB", (8, 8), (250, 20, 30))
    for image, kind in [
        (red.convert("CMYK"), "JPEG"),
        (red.convert("CMYK"), "TIFF"),
        (red.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        (red.convert("P", palette=Image.Palette.ADAPTIVE), "BMP"),
    ]:
        found = pixels(saved(image, kind)).astype(int)
        assert np.abs(found - (250, 20, 30)).max() <= 3, kind
    assert gray(saved(Image.fromarray(RAMP > 100), "PNG")).tolist() == ((RAMP > 100) * 255).tolist()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 2


def test_what_starts_a_program_or_is_of_another_kind_is_no_image(tmp_path, monkeypatch):
    """PostScript by the name of a PNG: Pillow alone would hand it to Ghostscript."""
    ran = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert shutil.which("gs") == str(tmp_path / "gs")
    postscript = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    others = [saved(Image.fromarray(RAMP), kind) for kind in ("ICO", "TGA", "PCX", "SGI")]
    for data in [postscript, b"<html>404</html>", b"\0", *others]:
        with pytest.raises(ValueError, match="not one of JPEG, PNG"):
            decode_image(data)
    assert not ran.exists()


def test_what_a_phones_images_need_is_told(monkeypatch):
    avif = saved(Image.new("RGB", (8, 8)), "AVIF")
    heic = b"\0\0\0\x18ftypheic" + b"\0" * 40
    monkeypatch.setattr(images, "_INSTALLED", images.FORMATS)
    with pytest.raises(ValueError, match=r"AVIF needs Pillow 11\.3 or newer"):
        decode_image(avif)
    with pytest.raises(ValueError, match=r'HEIF needs pip install "diffmoe\[heic\]"'):
        decode_image(heic)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_alpha_grays_and_many_bits_of_a_phones_images_are_read(kind):
    if kind == "HEIF":
        heif()
    half = np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None].repeat(64, 0)
    color = Image.new("RGB", (64, 64), (200, 40, 90))
    color.putalpha(Image.fromarray(half))
    found = pixels(saved(color, kind, quality=100)).astype(int)
    assert (found[:, :30] == 255).all()
    assert np.abs(found[:, 34:] - (200, 40, 90)).max() <= 4
    ramp = np.arange(0, 256, 4, dtype=np.uint8)[None].repeat(64, 0)
    depths = [ramp]
    if kind == "HEIF":  # 12 bits, as phones write HDR
        depths.append(ramp.astype(np.uint16) * 257)
    for grays in depths:
        found = gray(saved(Image.fromarray(grays), kind, quality=100)).astype(int)
        assert np.abs(found - ramp).max() < 4


def test_bombs_are_bad_images():
    png = saved(Image.new("L", (8, 8)), "PNG")
    header = png[12:16] + (60_000).to_bytes(4, "big") * 2 + png[24:29]
    huge = png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]
    with pytest.raises(ValueError, match="DecompressionBombError"):
        decode_image(huge)


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "AVIF", "HEIF"]
)
def test_cut_and_flipped_files_are_images_or_value_errors(kind):
    """300 seeded changes of a file: never another error, never another size of array type."""
    if kind == "HEIF":
        heif()
    data = saved(Image.fromarray(RNG.integers(0, 256, (9, 7, 3), np.uint8)), kind)
    rng = np.random.default_rng(1)
    refused = 0
    for round_ in range(300):
        changed = bytearray(data)
        if round_ % 3 == 0:
            changed = changed[: rng.integers(len(data))]
        for place in rng.integers(0, max(1, len(changed)), 1 + round_ % 5):
            if changed:
                changed[place] = rng.integers(256)
        try:
            assert decode_image(bytes(changed)).mode == "RGB"
        except ValueError:
            refused += 1
    assert refused > 50


def test_backgrounds_are_named_as_pillow_does():
    assert [parse_color(name) for name in ("white", "#0a0B0c", "rgb(1,2,3)")] == [
        (255, 255, 255),
        (10, 11, 12),
        (1, 2, 3),
    ]
    with pytest.raises(UserError, match=r"--background chequered.*white"):
        parse_color("chequered")


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


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((240, 100), (40, 120)),
        ((100, 240), (40, 120)),
        ((330, 470), (200, 50)),
        ((80, 80), (30, 70)),
        ((20, 30), (40, 120)),
    ],
)
def test_a_rectangle_is_filled_from_the_middle(given, wanted):
    """The crop is the middle of the image, resized so that nothing of the rectangle stays empty."""
    width, height = given
    ramps = np.zeros((height, width, 3), np.uint8)
    ramps[:, :, 0] = np.linspace(0, 250, width).astype(np.uint8)
    ramps[:, :, 1] = np.linspace(0, 250, height).astype(np.uint8)[:, None]
    found = center_crop(Image.fromarray(ramps), wanted)
    assert found.shape == (*wanted, 3)
    assert found[:, :, :2].mean((0, 1)) == pytest.approx([125, 125], abs=4)  # centered
    scale = max(wanted[0] / height, wanted[1] / width)
    spread = [wanted[1] / (width * scale), wanted[0] / (height * scale)]  # the share that is kept
    steps = [np.ptp(found[:, :, axis].astype(float)) / 250 for axis in (0, 1)]
    assert steps == pytest.approx(spread, abs=0.06)
    assert max(spread) == pytest.approx(1)
