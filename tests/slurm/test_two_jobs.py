"""Two jobs in one output on a real Slurm, and one that is requeued after its node was lost."""

import json
from pathlib import Path

import pytest

from tests.helpers.cluster import STEPS, Cluster, newest, steps, submit
from tests.helpers.runs import pack

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def test_a_second_job_refuses_and_the_requeued_first_goes_on_at_once(
    cluster: Cluster, tmp_path: Path
):
    data = pack(tmp_path / "digits", shape=(1, 28, 28), classes=10)
    run = tmp_path / "run"
    first = submit(cluster, data, run, "training.checkpoint_samples=80", seconds=0.5)
    first.wait_for(lambda: newest(run) != "none", "checkpoint")
    second = submit(cluster, data, run, "logging.log_samples=16")
    assert second.end() == "FAILED", second.log
    assert f"error: output={run} is in use by process " in second.log
    assert f"Slurm job {first.number}, started" in second.log
    assert first.field("JobState") == "RUNNING"

    cluster.command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    first.wait_for(
        lambda: (first.field("JobState"), first.field("Restarts")) == ("PENDING", "1"), "requeue"
    )
    # Nothing else tells that the first start has ended: as on another machine, and no process.
    for lease in run.glob("lease-*.json"):
        lease.unlink()
    left = {"host": "n17", "pid": 1, "machine": "another boot", "process": "1"}
    left |= {"job": first.number, "restart": 0, "since": "2026-01-01T00:00:00+00:00"}
    (run / "lease-3.json").write_text(json.dumps(left))
    first.restarted()
    assert first.end() == "COMPLETED", first.log
    assert newest(run) == f"step-{STEPS:08d}"
    assert steps(run) == STEPS
    assert (
        f"taking over {run}: it was held by process 1 on n17, Slurm job {first.number}" in first.log
    )
    assert "this is the same Slurm job, requeued" in first.log
    assert not list(run.glob("lease-*.json"))
    log = (next(run.glob(f"logs/job-{first.number}.1/rank-0000.log"))).read_text()
    assert "waiting until it has shown no sign of life" not in log
