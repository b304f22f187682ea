"""Options that several tools share are spelled alike and mean the same."""

import importlib.util
import sys
from pathlib import Path

import pytest

from diffmoe.cli import settings_of, sweep_of
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from tests.helpers.processes import ROOT

TOOLS = {
    "sample": ["run"],
    "evaluate": ["run", "--num", "4"],
    "calibrate": ["run", "--capacity", "1"],
    "report_routing": ["run"],
}
WORDS = "--sampler heun --steps 7 --guidance 2 --guided-channels 1 --shift 3 --seed 5 --eta 0"
EXPECTED = SamplingSettings("heun", 7, 2.0, (0.2, 0.9), 1, 3.0, 0.0, 5)


def parsed(tool: str, words: list[str], monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location(Path(tool).stem, ROOT / f"tools/{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = [*TOOLS[tool], *words]
    monkeypatch.setattr(sys, "argv", [tool, *words])
    return module.parse(words) if tool == "evaluate" else module.parse()


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_samples_by_the_same_words(tool, monkeypatch):
    words = [*WORDS.split(), "--guidance-interval", "0.2,0.9"]
    options = parsed(tool, words, monkeypatch)
    (found,) = sweep_of(options) if tool == "evaluate" else [settings_of(options)]
    assert found == EXPECTED
    assert options.labels == "balanced"
    assert parsed(tool, ["--labels", "random"], monkeypatch).labels == "random"
    steps = 250 if tool in ("sample", "evaluate") else 50
    usual = settings_of(parsed(tool, [], monkeypatch))
    assert usual == SamplingSettings(steps=steps, guidance=None, shift=None)
    with pytest.raises(UserError, match="--guidance-interval a,b: write numbers with commas"):
        parsed(tool, ["--guidance-interval", "a,b"], monkeypatch)


def test_evaluate_takes_several_guidance_scales(monkeypatch):
    options = parsed("evaluate", ["--guidance", "1", "1.5", "2", "--steps", "7"], monkeypatch)
    assert [one.guidance for one in sweep_of(options)] == [1, 1.5, 2]
    assert {one.steps for one in sweep_of(options)} == {7}
    assert [one.guidance for one in sweep_of(parsed("evaluate", [], monkeypatch))] == [None]


DTYPE_TOOLS = {**TOOLS, "demo": ["run"]}


@pytest.mark.parametrize("tool", DTYPE_TOOLS)
def test_every_tool_that_runs_a_network_takes_its_type(tool, monkeypatch):
    monkeypatch.setitem(TOOLS, tool, DTYPE_TOOLS[tool])
    assert parsed(tool, ["--dtype", "bf16"], monkeypatch).dtype == "bf16"
    assert parsed(tool, [], monkeypatch).dtype is None  # by device
    with pytest.raises(SystemExit):
        parsed(tool, ["--dtype", "fp8"], monkeypatch)


def test_a_loss_takes_the_type_by_its_older_name_too(monkeypatch):
    monkeypatch.setitem(TOOLS, "evaluate", ["loss", "run"])
    for flag in ("--dtype", "--precision"):
        options = parsed("evaluate", [flag, "bf16"], monkeypatch)
        assert options.precision == "bf16"
        assert "dtype" not in options  # the network is opened as training has it


def test_the_interval_that_evaluate_once_took_is_still_read(monkeypatch):
    for words in (["0.2", "0.9"], ["0.2", "0.9", "--steps", "3"], ["0.2,0.9", "--steps", "3"]):
        options = parsed("evaluate", ["--guidance-interval", *words], monkeypatch)
        assert options.guidance_interval == (0.2, 0.9)


def test_the_interval_of_sample_leaves_the_next_word_alone(monkeypatch):
    monkeypatch.setitem(TOOLS, "sample", [])
    options = parsed("sample", ["--guidance-interval", "0.2,0.9", "run"], monkeypatch)
    assert (options.guidance_interval, options.run) == ((0.2, 0.9), "run")


@pytest.mark.parametrize(("word", "found"), [("3", 3), ("cat,dog", "cat,dog"), ("3,5", "3,5")])
def test_a_report_is_of_the_first_classes_or_of_a_list(word, found, monkeypatch):
    assert parsed("report_routing", ["--classes", word], monkeypatch).classes == found
