"""Recipes with overrides."""

import pytest

from diffmoe.errors import UserError
from diffmoe.recipes import load_config


def refusal(*overrides: str, name: str = "mnist") -> str:
    """What the user reads when these overrides are refused."""
    with pytest.raises(UserError) as caught:
        load_config(name, overrides)
    return str(caught.value)
