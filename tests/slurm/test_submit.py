"""tools/submit.py: refuses on the login node, shows the plan, submits what it shows."""

import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from diffmoe.errors import UserError
from diffmoe.planning import submission
from diffmoe.planning.machine import Machine
from tests.slurm.cluster import Cluster, Job
from tests.slurm.test_jobs import SETTINGS
from tests.training.commands import ROOT, command
from tests.training.runs import pack, run_config

SUBMIT = str(ROOT / "tools/submit.py")
SIZE = ("s", "--recipe", "mnist", "--nodes", "2", "--gpus-per-node", "1", "--cpus-per-task", "1")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pack(tmp_path / "data", shape=(1, 28, 28), classes=10)


def submit(data: Path, *more: str) -> subprocess.CompletedProcess[str]:
    run = data.parent / "run"
    settings = (*SETTINGS, f"data.path={data}", f"output={run}")
    return command(sys.executable, SUBMIT, *SIZE, *settings, *more)


def test_a_dry_run_shows_all_and_changes_nothing(data: Path):
    before = sorted(data.parent.rglob("*"))
    done = submit(data, "--dry-run", "--account", "ours", "--time", "01:00:00")
    assert done.returncode == 0, done.stderr
    for part in (
        "mnist on 2 nodes x 1 GPUs",
        "parallel.expert_parallel=2",
        "all_to_all of tokens to experts and back over 2 ranks",
        "assumed: products reach 396 TFLOP/s",
        "#SBATCH --nodes=2\n",
        "#SBATCH --ntasks-per-node=1\n",
        "#SBATCH --account=ours\n",
        "#SBATCH --time=01:00:00\n",
        f"export DIFFMOE_RUN={data.parent}/run\n",
        "diffmoe_train mnist parallel.expert_parallel=8 parallel.zero_stage=2 --device cpu",
    ):
        assert part in done.stdout, part
    assert sorted(data.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("data.lanes=6", "training.batch_size=24", "--nodes", "4"), "data.lanes=6 is not"),
        (("--nodes", "3"), "3 ranks are not divisible by parallel.expert_parallel=2"),
        (("data.path=/nowhere",), "/nowhere"),
        (("--ds_config", "/none.json"), "cannot read --ds_config /none.json"),
        (("model.colour=red",), "unknown key model.colour"),
        (("--gpu-memory", "2"), "--gpu-memory is 2"),
    ],
)
def test_what_cannot_run_is_refused(data: Path, more: tuple[str, ...], message: str):
    done = submit(data, *more)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (data.parent / "run").exists()


def test_too_little_disk_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pack(tmp_path / "data")
    usage = namedtuple("usage", "free")(1_000_000)
    monkeypatch.setattr(submission.shutil, "disk_usage", lambda _: usage)
    config = run_config(tmp_path, 1, training__keep_last=3)
    with pytest.raises(UserError, match=r"0\.0 GB are free there.*training\.keep_last=3"):
        submission.check(config, None, 1, 2, Machine())


def test_a_submitted_chain_trains_to_the_end(cluster: Cluster, data: Path):
    run = data.parent / "run"
    settings = (*SETTINGS, "training.total_samples=80", f"data.path={data}", f"output={run}")
    told = cluster.command(
        sys.executable, SUBMIT, *SIZE, *settings, "--chain", "2", WANDB_MODE="disabled"
    )
    first, second = (Job(cluster, number) for number in re.findall(r"job (\d+)", told))
    assert second.field("Dependency").startswith(f"afterok:{first.number}")
    assert len(list((run / "submitted").glob("*.sh"))) == 1
    assert first.end() == "COMPLETED", first.log
    assert (run / "latest").read_text() == "step-00000010"
    assert f"tail -F {run}/submitted/*-{first.number}.out" in told
    cluster.command("scancel", second.number)
