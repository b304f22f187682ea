"""`diffmoe COMMAND`: the commands of a clone, and the same of an installation far from one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.models import exported
from tests.helpers.processes import ROOT, command, environment


def test_without_a_command_all_are_listed_at_once():
    done = command(sys.executable, "-X", "importtime", "-m", "diffmoe")
    assert done.returncode == 0
    for file in [ROOT / "train.py", *(ROOT / "tools").glob("*.py")]:
        assert f"\n  {file.stem.replace('_', '-')} " in done.stdout
    assert "Train a DiffMoE." in done.stdout
    assert "diffmoe.train" in done.stdout
    assert not any(line.endswith(" torch") for line in done.stderr.splitlines())


@pytest.mark.parametrize("name", ["convert-checkpoint", "convert_checkpoint", "conv"])
def test_a_command_goes_by_its_name_or_a_unique_beginning(name: str):
    done = command(sys.executable, "-m", "diffmoe", name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: diffmoe convert-checkpoint ")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("encode", "no command encode; could be encode-features or encode-latents or encode-text"),
        ("paint", "no command paint; there are train, benchmark, calibrate, "),
    ],
)
def test_other_names_are_refused(name: str, told: str):
    done = command(sys.executable, "-m", "diffmoe", name)
    assert done.returncode == 2
    assert told in done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as pip installs it from a source distribution's files."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    kept = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in (name for name in kept if name and not name.startswith("tests/")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = command(*pip, "--target", str(folder / "site"), str(source), timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def far_away(installed: Path, at: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    settings = environment(PYTHONPATH=str(installed), PATH=f"{installed}/bin:{os.environ['PATH']}")
    return subprocess.run(
        ["diffmoe", *map(str, words)],
        cwd=at, env=settings, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_an_installation_samples_plans_and_lists(installed: Path, tmp_path: Path):
    listed = far_away(installed, tmp_path)
    assert listed.returncode == 0, listed.stderr
    here = command(sys.executable, "-m", "diffmoe").stdout
    assert listed.stdout == here
    model = exported(tmp_path / "model")
    words = ["--classes", "0", "--per-class", "1", "--steps", "1", "--device", "cpu"]
    done = far_away(installed, tmp_path, "sample", model, *words, "--out", "grid.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").stat().st_size > 50
    planned = far_away(installed, tmp_path, "plan", "--recipe", "s_e8", "--nodes", "1")
    assert "recommended: " in planned.stdout, planned.stderr
    settings = far_away(installed, tmp_path, "train", "--config", "mnist", "--print-config")
    assert "experts: 4" in settings.stdout, settings.stderr


def test_an_installation_says_that_jobs_need_a_clone(installed: Path, tmp_path: Path):
    done = far_away(installed, tmp_path, "submit", "s", "--dry-run", "data.path=none")
    assert done.returncode == 2
    assert "jobs run the slurm/ and train.py of a clone" in done.stderr
