"""Jobs of the templates, small, on the Slurm of two nodes."""

from pathlib import Path

from tests.helpers.cluster import Cluster, Job

STEPS = 60
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
# The quick start's recipe, small.
SETTINGS = (
    "--device",
    "cpu",
    "model.width=16",
    "model.depth=2",
    "model.heads=2",
    "training.batch_size=8",
    f"training.total_samples={8 * STEPS}",
    "training.checkpoint_samples=160",
    "training.keep_last=100",
    "logging.log_samples=8",
    "data.workers=0",
    "parallel.expert_parallel=2",
)


def submit(
    cluster: Cluster, data: Path, run: Path, *settings: str, seconds: float = 0, **more: str
) -> Job:
    return cluster.submit(
        *SETTINGS,
        *settings,
        script="train_s.sh",
        options=TWO_NODES,
        DIFFMOE_RECIPE="mnist",
        DIFFMOE_DATA=str(data),
        DIFFMOE_RUN=str(run),
        TEST_SECONDS_A_STEP=str(seconds),
        WANDB_MODE="offline",
        **more,
    )


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def newest(run: Path) -> str:
    return (run / "latest").read_text() if (run / "latest").exists() else "none"
