"""slurm/evaluate.sh: which command each task of an array runs, without a cluster."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "evaluate.sh"


@pytest.fixture
def home(tmp_path):
    """The real common.sh, but what it would launch is printed."""
    (tmp_path / "slurm").mkdir()
    common = SCRIPT.with_name("common.sh").read_text()
    printing = '\ndiffmoe_tool() { echo "$@"; }\n'
    (tmp_path / "slurm" / "common.sh").write_text(common + printing)
    return tmp_path


def job(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    given = {"DIFFMOE_HOME": str(home), "DIFFMOE_RUN": "runs/xl", "DIFFMOE_REFERENCE": "ref.npz"}
    return subprocess.run(
        ["bash", SCRIPT, *words],
        env={"PATH": os.environ["PATH"], **given, **environment},
        cwd=home,
        capture_output=True,
        text=True,
    )


def test_a_single_job_takes_the_run(home):
    done = job(home, "--guidance", "1")
    assert done.stdout.strip() == (
        "evaluation/xl tools/evaluate.py runs/xl --num-samples 50000 --reference ref.npz "
        "--out evaluation/xl --guidance 1"
    )


@pytest.mark.parametrize("kind", ["ema", "step"])
def test_each_task_of_an_array_takes_its_average(home, kind):
    for step in (16, 8):
        (home / "runs/xl" / f"{kind}-{step:08d}").mkdir(parents=True)
    words = [job(home, SLURM_ARRAY_TASK_ID=str(task)).stdout.split() for task in (0, 1)]
    assert [line[2] for line in words] == [f"runs/xl/{kind}-00000008", f"runs/xl/{kind}-00000016"]
    assert [line[0] for line in words] == [f"evaluation/xl/{kind}-{n:08d}" for n in (8, 16)]


def test_a_task_beyond_the_averages_says_how_many_there_are(home):
    (home / "runs/xl/ema-00000008").mkdir(parents=True)
    done = job(home, SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 2
    assert "array task 1: runs/xl has no average of this number" in done.stderr
    assert "--array=0-0" in done.stderr
