"""A real Slurm of two nodes on this machine, and jobs on it."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.processes import ROOT, environment

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")

# train.py, slowed down (until it is requeued) and broken as the environment says.
TRAIN = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from diffmoe.training.step import TrainingStep
run = TrainingStep.run
def slow(step, *arguments, **options):
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        time.sleep(float(os.environ.get("TEST_SECONDS_A_STEP", 0)))
    if os.environ.get("TEST_CRASH") == f"{{os.environ['RANK']}} at {{step.samples}}":
        raise ZeroDivisionError("a bug")
    if os.environ.get("TEST_PROBE"):
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "GLOO_SOCKET_IFNAME")
        print("probe", *(os.environ.get(name) for name in names), flush=True)
    return run(step, *arguments, **options)
TrainingStep.run = slow
del sys.path[0]
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("real_train", {str(ROOT / "train.py")!r})
train = module_from_spec(spec)
spec.loader.exec_module(train)
sys.exit(train.main())
"""


def missing() -> str | None:
    """Why no Slurm can be started here; None if it can."""
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} missing: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    return None


class Cluster:
    """folder: all of it. home: a repository whose train.py can be slowed down and broken."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir(parents=True)
        for name in ("slurm", "tools", "diffmoe", "deepspeed_configs"):
            (self.home / name).symlink_to(ROOT / name)
        (self.home / "train.py").write_text(TRAIN)
        script = ROOT / "tests/slurm/start-cluster.sh"
        # Daemons must not hold this process's pipes.
        with open(folder / "start.log", "w") as log:
            done = subprocess.run(
                ["bash", script, folder], stdout=log, stderr=log, timeout=60, check=False
            )
        if done.returncode:
            told = (folder / "start.log").read_text()
            self.stop()
            raise RuntimeError(f"the cluster did not start:\n{told}")

    def stop(self) -> None:
        script = ROOT / "tests/slurm/stop-cluster.sh"
        subprocess.run(["bash", script, self.folder], timeout=120, check=False)

    def environment(self, **more: str) -> dict[str, str]:
        return environment(
            SLURM_CONF=str(self.folder / "slurm.conf"),
            PATH=f"{Path(os.sys.executable).parent}:{os.environ['PATH']}",
            DIFFMOE_MASTER="127.0.0.1",
            DIFFMOE_INTERFACE="lo",
            **more,
        )

    def command(self, *arguments: str, **more: str) -> str:
        done = subprocess.run(
            arguments,
            env=self.environment(**more),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(
        self, *arguments: str, options: tuple[str, ...] = (), script: str, **more: str
    ) -> "Job":
        """sbatch; `more` joins the job's environment."""
        told = self.command("sbatch", "--parsable", *options, f"slurm/{script}", *arguments, **more)
        return Job(self, told.strip())


class Job:
    def __init__(self, cluster: Cluster, number: str) -> None:
        self.cluster, self.number = cluster, number

    def field(self, name: str) -> str:
        told = self.cluster.command("scontrol", "--oneliner", "show", "job", self.number)
        return re.search(rf"(?:^| ){name}=(.*?)(?= [A-Z][\w/:]*=| *\n)", told)[1]

    @property
    def log(self) -> str:
        path = Path(self.field("StdOut"))
        return path.read_text() if path.exists() else ""

    def signal_as_before_a_limit(self) -> None:
        """USR1 to the batch shell, what --signal=B:USR1@120 sends."""
        self.cluster.command("scancel", "--signal=USR1", "--batch", self.number)

    def restarted(self, count: int = 1) -> None:
        """Wait until the job runs again. Slurm's delay (20 s and more) is cut short."""
        requeued = ("PENDING", "RUNNING")
        self.wait_for(
            lambda: self.field("Restarts") == str(count) and self.field("JobState") in requeued,
            f"requeue {count}",
        )
        time.sleep(6)  # cred_expire of slurm.conf: earlier it kills the job for its old credential
        if self.field("JobState") == "PENDING":
            self.cluster.command("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        self.wait_for(lambda: self.field("JobState") == "RUNNING", f"restart {count}")

    def end(self, seconds: float = 90) -> str:
        """The state in which it ended."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        self.wait_for(lambda: self.field("JobState") not in going, "the end", seconds)
        return self.field("JobState")

    def wait_for(self, happened: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, (
                f"no {what} in {seconds} s; job {self.number} is {self.field('JobState')}:\n"
                + self.log
            )
            time.sleep(0.2)


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
