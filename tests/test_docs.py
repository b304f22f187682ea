"""The pages name what is there: files, tools, their flags, settings."""

import re
from pathlib import Path

import pytest

from diffmoe.config import Config
from tests.helpers.pages import PAGES, ROOT, commands


def in_repository(words: list[str]) -> tuple[Path, list[str]] | None:
    """The script of ours that a command runs, and its arguments."""
    for index, word in enumerate(words):
        if word.endswith((".py", ".sh")) and "=" not in word:
            return ROOT / word, words[index + 1 :]
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path = link.partition("#")[0]
        if path and not link.startswith("http"):
            assert (page.parent / path).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_scripts_flags_and_settings_that_exist(page: Path):
    shared = (ROOT / "diffmoe/cli.py").read_text()
    for words in commands(page):
        found = in_repository(words)
        if found is None:
            continue
        script, arguments = found
        assert script.exists(), words
        source = script.read_text() + shared
        for word in arguments:
            if re.match(r"--[a-z]", word) and script.suffix == ".py":
                flag = word.partition("=")[0]
                # Some parsers add a list of names.
                known = f'"{flag}"' in source or f'"{flag[2:]}"' in source
                assert known, f"{script.name} has no {flag}"
            setting = re.match(r"([a-z_]+)\.([a-z_]+)=", word)
            if setting:
                section = Config.model_fields[setting[1]].annotation
                assert setting[2] in section.model_fields, word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_in_backticks_exist(page: Path):
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)(?:::\w+)?`", page.read_text()):
        there = [(ROOT / folder / name).exists() for folder in ("", "diffmoe", "tests")]
        assert any(there), f"{page.name} names {name}"
