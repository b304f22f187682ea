"""Jobs of the templates on a real Slurm of two nodes."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.helpers.cluster import Cluster, Job
from tests.helpers.commands import ROOT
from tests.helpers.jobs import SETTINGS, STEPS, TWO_NODES, newest, steps, submit
from tests.helpers.pictures import NAME as EXTRACTOR
from tests.helpers.runs import assert_identical, pack, run_config, tensors, train

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("data") / "digits", shape=(1, 28, 28), classes=10)


@pytest.fixture(scope="module")
def two_runs(
    cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The same run twice, at the same time on the same nodes."""
    runs = tuple(tmp_path_factory.mktemp("runs") / name for name in ("one", "two"))
    jobs = [submit(cluster, data, run, TEST_PROBE="1") for run in runs]
    for job in jobs:
        assert job.end() == "COMPLETED", job.log
    return runs


@pytest.fixture(scope="module")
def undisturbed(two_runs: tuple[Path, Path]) -> Path:
    return two_runs[0]


def test_a_run_over_two_nodes_shares_experts_and_ends(undisturbed: Path):
    assert newest(undisturbed) == f"step-{STEPS:08d}"
    about = json.loads((undisturbed / newest(undisturbed) / "run.json").read_text())
    assert about["saved_by"]["world"] == 2
    assert about["config"]["parallel"]["expert_parallel"] == 2
    # Every rank's log in a file of its own; RANK, LOCAL_RANK, WORLD_SIZE, number of the node.
    logs = sorted(undisturbed.glob("logs/job-*.0/rank-*.log"))
    assert [log.name for log in logs] == ["rank-0000.log", "rank-0001.log"]
    assert "probe 0 0 2 0 lo" in logs[0].read_text()
    assert "probe 1 0 2 1 lo" in logs[1].read_text()


def test_two_jobs_at_once_do_not_meet(two_runs: tuple[Path, Path]):
    one, two = two_runs
    assert_identical(tensors(one / newest(one)), tensors(two / newest(two)))


def test_a_saved_link_of_a_chain_on_one_node_hands_over(
    cluster: Cluster, data: Path, tmp_path: Path
):
    run = tmp_path / "run"
    job = cluster.submit(
        *SETTINGS,
        script="train_s.sh",
        options=("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"),
        DIFFMOE_RECIPE="mnist",
        DIFFMOE_DATA=str(data),
        DIFFMOE_RUN=str(run),
        DIFFMOE_CHAIN="chain",
        DIFFMOE_LINK="1/2",
        DIFFMOE_CONTAINER="env TEST_PROBE=1 TEST_SECONDS_A_STEP=0.15",
        WANDB_MODE="disabled",
    )
    job.wait_for(lambda: steps(run) >= 3, "steps")
    job.signal_as_before_a_limit()
    assert job.end() == "COMPLETED", job.log
    assert newest(run) not in ("none", f"step-{STEPS:08d}")
    # RANK, LOCAL_RANK, WORLD_SIZE, number of the node.
    assert "probe 1 1 2 0 lo" in next(tmp_path.glob("run/logs/*/rank-0001.log")).read_text()
    assert "probe 0 0 2 0 lo" in job.log  # rank 0 is followed


def test_usr1_saves_requeues_and_the_end_is_the_same(
    cluster: Cluster, data: Path, tmp_path: Path, undisturbed: Path
):
    run = tmp_path / "run"
    job = submit(cluster, data, run, seconds=0.15)
    job.wait_for(lambda: steps(run) >= 5, "steps")
    job.signal_as_before_a_limit()
    job.restarted()
    reached = int(newest(run).removeprefix("step-"))
    assert 5 <= reached < STEPS
    assert reached % 20, "saved at the signal, not at an interval"
    identity = (run / "wandb_id").read_text().split()[0]
    assert job.end() == "COMPLETED", job.log
    assert "stopped in time, and saved\nrequeueing" in job.log
    assert "error: this cluster does not requeue" not in job.log
    assert f"resumed {run}/step-{reached:08d} at {8 * reached} samples" in job.log
    assert_identical(tensors(run / newest(run)), tensors(undisturbed / newest(undisturbed)))
    assert (run / "wandb_id").read_text().split()[0] == identity
    written = {path.name.rsplit("-", 1)[1] for path in run.glob("wandb/offline-run-*")}
    assert written == {identity}  # one wandb run, whatever the number of starts


def test_a_lost_node_requeues_and_the_run_goes_on(
    cluster: Cluster, data: Path, tmp_path: Path, undisturbed: Path
):
    run = tmp_path / "run"
    job = submit(cluster, data, run, "training.checkpoint_samples=80", seconds=0.15)
    job.wait_for(lambda: newest(run) != "none", "checkpoint")
    cluster.command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    job.restarted()  # the node returns to service by itself
    assert job.end() == "COMPLETED", job.log
    assert f"resumed {run}/step-" in job.log
    assert_identical(tensors(run / newest(run)), tensors(undisturbed / newest(undisturbed)))


def test_a_crash_ends_the_job_with_its_traceback_and_no_requeue(
    cluster: Cluster, data: Path, tmp_path: Path
):
    job = submit(cluster, data, tmp_path / "run", TEST_CRASH="1 at 24")
    assert job.end() == "FAILED"
    assert job.field("ExitCode") == "1:0"
    assert job.field("Restarts") == "0"
    assert "[rank 1] Traceback" in job.log
    assert "ZeroDivisionError: a bug" in job.log
    assert "rank 0 has died" not in job.log


def test_a_fourth_start_without_progress_fails(cluster: Cluster, data: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    job = cluster.submit(
        *SETTINGS,
        script="train_s.sh",
        options=(*TWO_NODES, "--hold"),
        DIFFMOE_RECIPE="mnist",
        DIFFMOE_DATA=str(data),
        DIFFMOE_RUN=str(run),
    )
    (run / "slurm-starts").write_text(f"{job.number} start 3\n")
    cluster.command("scontrol", "release", job.number)
    assert job.end() == "FAILED"
    assert "error: 3 starts of this job in a row came no further than 'start'" in job.log
    assert newest(run) == "none"


def test_a_signal_before_there_are_ranks_is_counted_and_told(
    cluster: Cluster, data: Path, tmp_path: Path
):
    """A time limit shorter than the start: here it comes while the environment is entered."""
    run, venv = tmp_path / "run", tmp_path / "venv/bin"
    run.mkdir()
    venv.mkdir(parents=True)
    (venv / "activate").write_text("kill -USR1 $$\n")
    job = cluster.submit(
        *SETTINGS,
        script="train_s.sh",
        options=(*TWO_NODES, "--hold"),
        DIFFMOE_RECIPE="mnist",
        DIFFMOE_DATA=str(data),
        DIFFMOE_RUN=str(run),
        DIFFMOE_VENV=str(venv.parent),
    )
    (run / "slurm-starts").write_text(f"{job.number} start 2\n")
    cluster.command("scontrol", "release", job.number)
    # Its second start may have ended before anybody has seen it run.
    job.wait_for(lambda: job.field("Restarts") == "1", "requeue")
    assert job.end(180) == "FAILED"
    assert job.field("ExitCode") == "1:0"
    assert "s, too early to save anything\nrequeueing job" in job.log
    assert re.search(
        "error: 3 starts of this job in a row came no further than 'start'. The last one was asked "
        r"to stop \(USR1: time limit or preemption\) after \d+ s, too early to save anything; "
        r"give it more time \(sbatch --time\)\.",
        job.log,
    )
    assert not list(run.glob("logs/*/rank-*.log"))


def test_scancel_leaves_a_checkpoint_and_no_requeue(cluster: Cluster, data: Path, tmp_path: Path):
    run = tmp_path / "run"
    job = submit(cluster, data, run, seconds=0.15)
    job.wait_for(lambda: steps(run) >= 3, "steps")
    cluster.command("scancel", job.number)
    assert job.end() == "CANCELLED"
    job.wait_for(lambda: newest(run) != "none", "checkpoint")
    assert job.field("Restarts") == "0"


def test_a_job_samples_from_a_run(cluster: Cluster, tmp_path: Path, undisturbed: Path):
    out = tmp_path / "samples"
    job = cluster.submit(
        *("--num-samples", "20", "--steps", "2", "--guidance", "1", "--device", "cpu"),
        script="sample.sh",
        options=TWO_NODES,
        DIFFMOE_RUN=str(undisturbed),
        DIFFMOE_OUT=str(out),
    )
    assert job.end() == "COMPLETED", job.log
    assert json.loads((out / "samples.json").read_text())["number"] == 20


def test_a_job_encodes_images(cluster: Cluster, tmp_path: Path):
    from PIL import Image

    for number in range(20):
        path = tmp_path / f"images/{number % 2}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(path)
    job = cluster.submit(
        *("--pixels", "--size", "16", "--device", "cpu"),
        script="encode_latents.sh",
        options=TWO_NODES,
        DIFFMOE_IMAGES=str(tmp_path / "images"),
        DIFFMOE_DATA=str(tmp_path / "data"),
    )
    assert job.end() == "COMPLETED", job.log
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert sum(shard["samples"] for shard in manifest["shards"]) == 20


def test_an_array_evaluates_the_averages_of_a_run(cluster: Cluster, tmp_path: Path):
    pack(tmp_path / "data", shape=(3, 8, 8))
    config = run_config(tmp_path, 4, model__in_channels=3, training__snapshot_samples=16)
    train(config)
    array = cluster.submit(
        *("--num-samples", "10", "--steps", "2", "--extractor", EXTRACTOR, "--device", "cpu"),
        script="evaluate.sh",
        options=(*TWO_NODES, "--array=0-1"),
        DIFFMOE_RUN=config.output,
        DIFFMOE_REFERENCE=str(tmp_path / "data"),
        DIFFMOE_OUT=str(tmp_path / "figures"),
        PYTHONPATH=str(ROOT),
    )
    for task, samples in ((0, 16), (1, 32)):
        job = Job(cluster, f"{array.number}_{task}")
        assert job.end() == "COMPLETED", job.log
        file = tmp_path / f"figures/ema-{samples // 8:08d}/results.jsonl"
        (result,) = map(json.loads, file.read_text().splitlines())
        assert result["clock"]["samples"] == samples
        assert result["number"] == 10
        assert result["metrics"][f"FD-{EXTRACTOR}"] > 0
