"""Classes by number and by name, wherever they are given."""

from pathlib import Path

import pytest

from diffmoe.errors import UserError
from diffmoe.sampling.classes import class_numbers

NAMES = ["plane", "tench, Tinca tinca", "7", "cat", "tench"]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("cat", [3]),
        ("plane,2,cat", [0, 2, 3]),
        ("plane, cat", [0, 3]),
        ("cat,tench, Tinca tinca,tench", [3, 1, 4]),  # a name with a comma
        ("-1", [-1]),  # refused where the model is known
    ],
)
def test_numbers_and_names_in_any_mixture(text, numbers):
    assert class_numbers(text, NAMES, Path("run")) == numbers


def test_a_number_is_no_name():
    assert class_numbers("0,1", ["1", "0"], Path("run")) == [0, 1]


def test_what_is_neither_is_named():
    with pytest.raises(UserError, match=r"class 'dog' is unknown to run; its names are plane, ten"):
        class_numbers("cat,dog", NAMES, Path("run"))
    with pytest.raises(UserError, match=r"--classes cat: write numbers .* run has no class names"):
        class_numbers("cat", (), Path("run"))
