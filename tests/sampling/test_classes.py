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
        ("0-2,cat", [0, 1, 2, 3]),
        ("5-5", [5]),
        ("-1", [-1]),  # refused where the model is known
    ],
)
def test_numbers_and_names_in_any_mixture(text, numbers):
    assert class_numbers(text, NAMES, Path("run")) == numbers


def test_a_range_runs_upwards_and_a_name_like_one_is_a_name():
    with pytest.raises(UserError, match="--classes 4-2: write a range as 2-4"):
        class_numbers("4-2", NAMES, Path("run"))
    assert class_numbers("1-2", ["1-2", "7-9"], Path("run")) == [0]


def test_a_number_is_no_name():
    assert class_numbers("0,1", ["1", "0"], Path("run")) == [0, 1]


def test_what_is_neither_is_named():
    with pytest.raises(UserError, match=r"class 'dog' is unknown to run; its names are plane, ten"):
        class_numbers("cat,dog", NAMES, Path("run"))
    with pytest.raises(UserError, match=r"--classes cat: write numbers .* run has no class names"):
        class_numbers("cat", (), Path("run"))
