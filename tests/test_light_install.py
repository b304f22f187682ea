"""Without the extra `train` models are opened and sampled, and training says what to install."""

import subprocess
import sys
from pathlib import Path

from diffmoe.errors import TRAINING_PACKAGES
from tests.helpers.models import exported
from tests.helpers.processes import ROOT, environment

# Runs a script of ours as if the packages of training were not installed.
WITHOUT = f"""
import runpy, sys
for name in {TRAINING_PACKAGES}:
    sys.modules[name] = None
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def light(*words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT, *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )


def test_models_are_sampled_described_and_evaluated(tmp_path: Path):
    folder = exported(tmp_path / "model")
    samples = tmp_path / "samples"
    words = ["--num-samples", "4", "--steps", "2", "--device", "cpu"]
    for command in (
        ["tools/sample.py", folder, *words, "--out", samples],
        ["tools/convert_checkpoint.py", "info", folder],
    ):
        done = light(*command)
        assert done.returncode == 0, done.stderr
    assert (samples / "samples.json").exists()


def test_training_names_the_extra(tmp_path: Path):
    done = light("train.py", "--config", "mnist", f"output={tmp_path}", "data.path=none")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: deepspeed is not installed, which training and planning need: "
        'pip install -e ".[train]"'
    )
    planned = light("tools/submit.py", "s", "--dry-run", "data.path=none")
    assert planned.returncode == 2
    assert 'pip install -e ".[train]"' in planned.stderr
