"""Names beside the rows of a picture."""

from PIL import Image, ImageDraw, ImageFont

_SMALLEST, _LARGEST = 9, 20  # pixels of the letters
_LONGEST = 24  # letters of a name


def with_names(picture: Image.Image, names: list[str]) -> Image.Image:
    """The picture with a white margin at its left: a name for each of its rows, all equally high.

    A row that is lower than a line of text takes every second name, or fewer.
    """
    height = picture.height // len(names)
    font = ImageFont.load_default(min(max(_SMALLEST, height // 4), _LARGEST))
    shown = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in names]
    gap = _SMALLEST // 2
    margin = max(round(font.getlength(name)) for name in shown) + 2 * gap
    mode = "L" if picture.mode == "L" else "RGB"
    sheet = Image.new(mode, (margin + picture.width, picture.height), "white")
    sheet.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(sheet)
    top, bottom = font.getbbox("Ág")[1::2]
    every = -(-int(bottom - top) // height)
    for row in range(0, len(names), every):
        middle = row * height + height / 2
        draw.text((margin - gap, middle), shown[row], "black", font, anchor="rm")
    return sheet
