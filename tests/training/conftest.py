"""Fixtures of the training room."""

import importlib.util
import sys
from collections.abc import Callable

import pytest

from diffmoe.errors import run_command
from tests.helpers.commands import ROOT

TOOL = "tools/checkpoint.py"


@pytest.fixture
def tool(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """tools/checkpoint.py in this process: its exit code and all that it said."""
    spec = importlib.util.spec_from_file_location("checkpoint_tool", ROOT / TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_command(module.main)
        said = capsys.readouterr()
        return exit.value.code, said.out + said.err

    return call
