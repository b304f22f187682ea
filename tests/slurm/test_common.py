"""The bash functions of slurm/common.sh, without a cluster."""

import shutil
import subprocess
from pathlib import Path

import pytest

from diffmoe.planning.estimate import plan
from diffmoe.planning.layouts import Layout
from diffmoe.planning.machine import Machine
from diffmoe.planning.sbatch import template_settings
from diffmoe.recipes import load_config
from tests.helpers.processes import ROOT

TEMPLATES = {"s": 1, "b": 1, "l": 1, "xl": 4}


def bash(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-uc", f"source slurm/common.sh; {script}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("low", "high", "free"), [(32768, 60999, 22768), (1024, 40000, 25535), (15000, 64000, 5000)]
)
def test_ports_of_100_000_jobs(low: int, high: int, free: int):
    done = bash(f"for ((i = 1; i <= 100000; i++)); do diffmoe_port $i {low} {high}; done")
    ports = [int(line) for line in done.stdout.split()]
    assert len(ports) == 100_000
    assert all(1024 <= port <= 65535 and not low <= port <= high for port in ports)
    # Jobs whose numbers differ by less than `free` have different ports.
    last: dict[int, int] = {}
    for job, port in enumerate(ports):
        assert job - last.get(port, -free) >= free
        last[port] = job
    assert len(last) == free


def test_no_port_is_told(tmp_path: Path):
    done = bash("diffmoe_port 7 1024 65000")
    assert done.returncode == 2
    assert "ip_local_port_range=1024 65000 leaves fewer than 1,000 ports" in done.stderr


def test_starts_are_counted_until_something_was_saved(tmp_path: Path):
    count = f"diffmoe_count_start {tmp_path}"
    done = bash(
        "SLURM_JOB_ID=7; "
        f"{count} start; {count} start; {count} start; echo three $?; {count} start; echo four $?; "
        f"{count} step-20; echo saved $?; SLURM_JOB_ID=8; {count} step-20; "
        f"cat {tmp_path}/slurm-starts; DIFFMOE_CHAIN=c; "
        f"{count} step-20; SLURM_JOB_ID=9; {count} step-20; cat {tmp_path}/slurm-starts"
    )
    assert done.stdout.splitlines() == [
        "three 0",
        "four 1",
        "saved 0",
        "8 step-20 1",
        "c step-20 2",
    ]
    assert "error: 3 starts of this job in a row made no progress beyond 'start'" in done.stderr
    assert "The last one was killed from outside" in done.stderr


def test_how_the_last_start_ended_is_told(tmp_path: Path):
    (tmp_path / "slurm-starts").write_text("7 start 2\nfailed with code 1\n")
    count = f"SLURM_JOB_ID=7; diffmoe_count_start {tmp_path} start"
    assert bash(count).returncode == 0
    # The third start's own end replaces the second's.
    bash(f"diffmoe_ended {tmp_path} 'was asked to stop after 5 s'")
    told = bash(count)
    assert told.returncode == 1
    assert (
        "made no progress beyond 'start'. The last one was asked to stop after 5 s." in told.stderr
    )


def test_files_that_kills_leave_are_no_progress(tmp_path: Path):
    for name in ("samples-0.npz", "samples-1.npz.host-12.tmp"):
        (tmp_path / name).touch()
    told = bash(f'diffmoe_job() {{ echo "$@"; }}; diffmoe_tool {tmp_path} tools/sample.py')
    assert told.stdout.split() == [f"{tmp_path}-job", "1-files", "tools/sample.py"]


def test_a_prefix_without_activate_is_a_python_too(tmp_path: Path):
    """Such as conda's."""
    told = bash(
        f"DIFFMOE_VENV={tmp_path}; DIFFMOE_MASTER=n1; SLURM_JOB_ID=7; diffmoe_environment; "
        "echo $PATH"
    )
    assert told.stdout.startswith(f"{tmp_path}/bin:")


@pytest.mark.parametrize("size", TEMPLATES)
def test_heads_say_what_the_planner_says(size: str):
    text = (ROOT / f"slurm/train_{size}.sh").read_text()
    config = load_config(f"diffmoe_{size}_e16_flow", template_settings(text))
    planned = plan(Layout(config, TEMPLATES[size], 8), Machine())
    seconds = planned.seconds
    assert f"{planned.memory.total / 1e9:.1f} GB per GPU and {seconds:.3f} s per step" in text
    assert f"over {700_000 * round(seconds, 3) / 3600:.0f} hours" in text
    assert f"#SBATCH --nodes={TEMPLATES[size]}\n" in text


def test_shellcheck_is_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is missing: apt-get install shellcheck")
    scripts = [*ROOT.glob("slurm/*.sh"), *ROOT.glob("tests/slurm/*.sh")]
    assert len(scripts) >= 9
    done = subprocess.run(
        ["shellcheck", *scripts], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
