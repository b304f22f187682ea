"""--help of every command: at once, without torch, and with all defaults."""

import argparse
import importlib.util
import subprocess
import sys
from argparse import SUPPRESS
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmoe.config import Config
from diffmoe.config.settings import setting_names
from tests.helpers.processes import ROOT, environment
from tests.helpers.tiny import refusal

TOOLS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tools").glob("*.py"))
COMMANDS = ["train.py", *TOOLS]

# Runs the --help of every command with a torch that cannot be imported.
HELP = """
import runpy, sys, traceback
sys.modules["torch"] = None
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        print("\\n@", path, end.code)
    except ImportError:
        print("\\n@", path, traceback.format_exc().splitlines()[-3:])
"""


class Parsed(Exception):
    """Instead of parsing: the parser."""


def parser_of(tool: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Parsed(parser)

    for method in ("parse_args", "parse_known_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, stop)
    monkeypatch.setattr(sys, "argv", [tool])
    spec = importlib.util.spec_from_file_location(Path(tool).stem, ROOT / tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(Parsed) as caught:
        module.main()
    return caught.value.args[0]


def options_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of all subcommands, too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options_of(command)
        elif action.help != SUPPRESS:
            yield action


def test_every_help_needs_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends = [line.removeprefix("@ ") for line in done.stdout.splitlines() if line[:1] == "@"]
    assert ends == [f"{command} 0" for command in COMMANDS]
    assert done.stdout.count("\nusage: ") + done.stdout.startswith("usage: ") == len(COMMANDS)


def train_words(*words: str) -> subprocess.CompletedProcess:
    start = [sys.executable, "-X", "importtime", "train.py", *words]
    return subprocess.run(
        start, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )


def test_train_explains_every_setting_without_torch():
    done = train_words("--help-settings")
    assert done.returncode == 0
    assert not any(line.endswith(" torch") for line in done.stderr.splitlines())
    lines = [line.split("# ") for line in done.stdout.splitlines() if ": " in line.split("#")[0]]
    assert all(len(parts) > 1 and len(parts[1]) > 3 for parts in lines)
    told = [parts[0].strip().partition(":")[0] for parts in lines]
    names = setting_names(Config)
    assert len(names) > 80
    # The settings of model.text show in a text model alone, likewise of a wide head; a permission
    # never.
    names.remove("data.allow_commands")
    apart = ("model.text.", "model.wide_head.")
    expected = [name.rpartition(".")[2] for name in names if not name.startswith(apart)]
    assert sorted(told) == sorted([*expected, "text", "wide_head"])
    optimizer = train_words("--help-settings", "optimizer").stdout
    assert optimizer.startswith("# The optimizer and its schedule")
    assert "learning_rate" in optimizer
    assert "batch_size" not in optimizer
    done = train_words("--help-settings", "optimiser")
    assert done.returncode == 2
    assert "no section 'optimiser'; there are model, moe, diffusion, data, optimizer" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--batch_size", "32"], "unknown option --batch_size: settings are written section.key="
         "value, here training.batch_size=..."),
        (["--lr=1e-4"], "here optimizer.learning_rate=..."),
        (["--frobnicate"], "--help-settings explains them"),
    ],
)  # fmt: skip
def test_an_option_of_other_trainers_is_answered_with_the_setting(words, told):
    done = train_words("--config", "mnist", *words)
    assert done.returncode == 2
    assert told in done.stderr


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("lr=1e-4", "optimizer.learning_rate"),
        ("model.lr=1e-4", "optimizer.learning_rate"),
        ("batch_size=32", "training.batch_size"),
        ("model.dept=3", "model.depth"),
        ("model.batch_size=3", "training.batch_size"),
        ("moe.expert=3", "moe.experts"),
        ("training.epochs=3", "training.total_samples"),
        ("training.colour=red", None),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(override: str, near: str | None):
    message = refusal(override)
    if near is None:
        assert "Did you mean" not in message
    else:
        assert message.endswith(f". Did you mean {near}?")


@pytest.mark.parametrize("tool", COMMANDS)
def test_help_tells_every_default(tool: str, monkeypatch: pytest.MonkeyPatch):
    silent = []
    for option in options_of(parser_of(tool, monkeypatch)):
        if option.default is None or option.default is False or option.default in ([], SUPPRESS):
            told = "default" if option.dest == "device" else ""
        elif isinstance(option.default, list):
            told = " ".join(f"{value:g}" for value in option.default)
        elif isinstance(option.default, float):
            told = f"{option.default:g}"
        else:
            told = str(option.default)
        help_text = (option.help or "") % vars(option)
        if told and ("default" not in help_text or told not in help_text):
            silent.append(f"{option.option_strings}: {told}")
    assert silent == []


def test_what_help_repeats_is_what_the_code_does(monkeypatch: pytest.MonkeyPatch):
    """Written out in the tools, whose --help imports little."""
    from diffmoe.conversion import foreign
    from diffmoe.evaluation.curves import AXES
    from diffmoe.evaluation.extractors import DEFAULT
    from diffmoe.export import program, tensors
    from diffmoe.prepare.foreign_latents import FORMATS
    from diffmoe.prepare.sharding import default_shards

    def option(tool: str, flag: str) -> argparse.Action:
        found = options_of(parser_of(f"tools/{tool}.py", monkeypatch))
        return next(one for one in found if flag in one.option_strings)

    assert tuple(option("import_latents", "--format").choices) == tuple(FORMATS)
    assert tuple(option("convert_checkpoint", "--format").choices) == foreign.FORMATS
    formats = ("diffmoe", *foreign.FORMATS, *program.FORMS)
    assert tuple(option("convert_checkpoint", "--to").choices) == formats
    assert option("convert_checkpoint", "--vae").default == foreign.Options.autoencoder
    assert option("convert_checkpoint", "--scale").default == foreign.Options.scale
    assert option("convert_checkpoint", "--max-shard-gb").default * 1e9 == tensors.MAX_SHARD_BYTES
    assert option("evaluate", "--extractor").default == DEFAULT
    for tool in ("encode_latents", "import_latents"):
        assert f"at least {default_shards(1000)}" in option(tool, "--shards").help
    assert tuple(option("evaluate", "--against").choices) == tuple(AXES)
