"""Names beside the rows of a picture of samples."""

import numpy as np
import pytest
from PIL import Image

from diffmoe.contact_sheet import with_names


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_row_has_its_name_and_the_picture_stays(mode: str):
    pixels = np.random.default_rng(0).integers(0, 255, (96, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).convert(mode)
    sheet = with_names(picture, ["cat", "a very long name of a very rare class", "ship"])
    assert sheet.mode == mode
    margin = sheet.width - 64
    assert np.array_equal(np.asarray(sheet)[:, margin:], np.asarray(picture))
    written = np.asarray(sheet.convert("L"))[:, :margin] < 128
    inked = [row.any(1).nonzero()[0] for row in np.split(written, 3)]
    widths = [np.ptp(row.any(0).nonzero()[0]) for row in np.split(written, 3)]
    assert all(14 <= (row.min() + row.max()) / 2 <= 18 for row in inked)  # about their middle, 16
    assert widths[1] > widths[2] > widths[0] > 5
    assert np.array_equal(
        np.asarray(with_names(picture, ["cat", "dog", "ship"]))[:32, -64:], np.asarray(picture)[:32]
    )


def test_names_that_rows_have_no_room_for_are_left_out():
    picture = Image.new("L", (8, 32))
    margin = np.asarray(with_names(picture, ["xx"] * 8))[:, :-8]
    inked = (margin < 128).any(1)
    starts = np.flatnonzero(np.diff(inked.astype(int)) == 1)
    assert len(starts) == 2  # rows of 4 pixels: every third or so
