"""tools/submit.py: refuses on the login node, shows the plan, submits what it shows."""

import importlib.util
import json
import re
import sys
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from diffmoe.errors import UserError, run_command
from diffmoe.planning import submission
from diffmoe.planning.machine import Machine
from diffmoe.planning.sbatch import extra_options, node_memory
from tests.helpers.cluster import SETTINGS, Cluster, Job, steps
from tests.helpers.processes import ROOT
from tests.helpers.runs import pack, run_config

SUBMIT = str(ROOT / "tools/submit.py")
SIZE = ("s", "--recipe", "mnist", "--nodes", "2", "--gpus-per-node", "1", "--cpus-per-task", "1")

EVALUATED = ("training.evaluate_every=8",)

Submit = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pack(tmp_path / "data", shape=(1, 28, 28), classes=10)


@pytest.fixture
def submit(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Submit:
    """tools/submit.py in this process, of `data` into RUN beside it: exit code, output, errors."""
    spec = importlib.util.spec_from_file_location("submit_tool", SUBMIT)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*more: str) -> tuple[int, str, str]:
        settings = (*SETTINGS, f"data.path={data}", f"output={data.parent / 'run'}")
        monkeypatch.setattr(sys, "argv", [SUBMIT, *SIZE, *settings, *more])
        with pytest.raises(SystemExit) as end:
            run_command(tool.main)
        return end.value.code, *capsys.readouterr()

    return call


def test_a_dry_run_shows_all_and_changes_nothing(data: Path, submit: Submit):
    before = sorted(data.parent.rglob("*"))
    code, told, _ = submit("--dry-run", "--account", "ours", "--time", "01:00:00")
    assert code == 0
    for part in (
        "mnist on 2 nodes x 1 GPUs",
        "parallel.expert_parallel=2",
        "GB per node of 214.7, fits",
        "all_to_all of tokens to experts and back over 2 ranks",
        "assumed: matrix products achieve 396 TFLOP/s",
        "#SBATCH --nodes=2\n",
        "#SBATCH --ntasks-per-node=1\n",
        "#SBATCH --account=ours\n",
        "#SBATCH --time=01:00:00\n",
        f"export DIFFMOE_RUN={data.parent}/run\n",
        "diffmoe_train mnist parallel.expert_parallel=8 parallel.zero_stage=2 --device cpu",
    ):
        assert part in told, part
    assert sorted(data.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("data.lanes=6", "training.batch_size=24", "--nodes", "4"), "data.lanes=6 is not"),
        (("--nodes", "3"), "3 ranks are not divisible by parallel.expert_parallel=2"),
        (("data.path=/nowhere",), "/nowhere"),
        (("--ds_config", "/none.json"), "--ds_config: /none.json does not exist"),
        (("model.color=red",), "unknown key model.color"),
        (("--gpu-memory", "2"), "--gpu-memory is 2"),
        (
            ("--mem", "3G"),
            "GB of host memory per node, and the job requests 3.2 (--mem); request 5G",
        ),
        (("--mem", "much"), "--mem much: write it as for sbatch"),
        (("--sbatch", "--nodes=4"), "--nodes itself, so that what it checks is what runs"),
        (("--sbatch", "--gres=gpu:a100:2"), "asks for 2 GPUs per node, and --gpus-per-node is 1"),
        (
            (*EVALUATED, "evaluation.reference=/none.npz"),
            "evaluation.reference=/none.npz: the data is gray",
        ),
        (
            (*EVALUATED, "evaluation.classifier=digits", "evaluation.sampler=ddim"),
            "sampler ddim: a flow model takes",
        ),
        (
            (*EVALUATED, "evaluation.classifier=/none.pt"),
            "/none.pt",
        ),
    ],
)
def test_what_cannot_run_is_refused(
    data: Path, submit: Submit, more: tuple[str, ...], message: str
):
    code, _, told = submit(*more)
    assert code == 2
    assert message in told
    assert not (data.parent / "run").exists()


def test_the_deepspeed_json_counts_in_the_plan(tmp_path: Path):
    """Offloaded states move from the GPUs to the nodes, and buckets have the JSON's size."""
    pack(tmp_path / "data")
    config = run_config(tmp_path, 1)
    zero = {"reduce_bucket_size": 50_000, "overlap_comm": True}
    plans = {}
    for name, more in (("plain", {}), ("offload", {"offload_optimizer": {"device": "cpu"}})):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 2, **zero, **more}}))
        plans[name] = submission.check_submission(config, str(file), 1, 2, Machine())
    plain, offload = plans["plain"], plans["offload"]
    assert plain.layout.config.parallel.zero_stage == 2
    assert plain.memory.buckets == offload.memory.buckets == 2 * 50_000 * 4
    assert (plain.memory.masters > 0, offload.memory.masters) == (True, 0)
    assert (plain.host.states, offload.host.states > 0) == (0, True)


def test_too_little_disk_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pack(tmp_path / "data")
    usage = namedtuple("usage", "free")(1_000_000)
    monkeypatch.setattr(submission.shutil, "disk_usage", lambda _: usage)
    config = run_config(tmp_path, 1, training__keep_last=3)
    with pytest.raises(UserError, match=r"0\.0 GB are free there.*training\.keep_last=3"):
        submission.check_submission(config, None, 1, 2, Machine())


def test_an_output_that_is_a_file_is_refused(tmp_path: Path):
    pack(tmp_path / "data")
    (tmp_path / "taken").touch()
    config = run_config(tmp_path, 1).replace({"output": str(tmp_path / "taken/run")})
    with pytest.raises(UserError, match=r"taken/run: .*/taken cannot be written"):
        submission.check_submission(config, None, 1, 2, Machine())


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (["--qos=long --gres=gpu:a100:8"], {"qos": "long", "gres": "gpu:a100:8"}),
        (["--constraint ib", "--exclude=n7,n8"], {"constraint": "ib", "exclude": "n7,n8"}),
        (["-C 'ib&fast' -xn7 -q long"], {"constraint": "ib&fast", "exclude": "n7", "qos": "long"}),
        (["--exclusive --reservation=ours"], {"exclusive": None, "reservation": "ours"}),
        (["--gres=gpu:8(S:0),nvme:1"], {"gres": "gpu:8(S:0),nvme:1"}),
        (["--comment 'a b'"], {"comment": "a b"}),
    ],
)
def test_extra_options_by_their_long_names(given: list[str], options: dict[str, str | None]):
    assert extra_options(given, 8) == options


@pytest.mark.parametrize("given", ["long", "qos=long", "-t 1", "--output x", "--array=0-3", "---"])
def test_what_is_no_option_or_ours_is_refused(given: str):
    with pytest.raises(UserError, match=f'^--sbatch "{given.split()[0]}": '):
        extra_options([given], 8)


def test_memory_of_a_node():
    template = "#!/bin/bash\n#SBATCH --mem=200G\n"
    sizes = {None: 200 * 2**30, "1T": 2**40, "5000": 5000 * 2**20, "0": float("inf")}
    assert {mem: node_memory(mem, template) for mem in sizes} == sizes


def test_a_script_holds_all_settings_and_no_other_variables(
    submit: Submit, data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DIFFMOE_RECIPE", "another")
    monkeypatch.setenv("DIFFMOE_DATA", "/elsewhere")
    monkeypatch.setenv("DIFFMOE_INTERFACE", "ib0")
    monkeypatch.chdir(data.parent)
    options = ("--sbatch", "--qos=long --gres=gpu:1", "--sbatch", "-C ib", "--chain", "3")
    code, told, _ = submit("--dry-run", *options, "data.path=data")
    assert code == 0
    script = told[told.index("#!/bin/bash") :]
    assert re.findall("export (.*)=(.*)", script) == [
        ("DIFFMOE_INTERFACE", "ib0"),
        ("DIFFMOE_VENV", sys.prefix),
        ("DIFFMOE_HOME", str(ROOT)),
        ("DIFFMOE_RUN", str(data.parent / "run")),
        ("DIFFMOE_CHAIN", re.search(r"DIFFMOE_CHAIN=(\S+)", script)[1]),
        ("DIFFMOE_LINK", "${1:-}"),
    ]
    assert script.index('unset "${!DIFFMOE_@}"') < script.index("export ")
    for line in ("--qos=long", "--gres=gpu:1", "--constraint=ib", "--ntasks-per-node=1"):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --gpus-per-node" not in script  # Slurm would add it to --gres
    assert script.index("#SBATCH --constraint") < script.index("unset")
    assert f"data.path={data}" in script  # the job runs in the repository


@pytest.mark.cluster
@pytest.mark.slow
def test_a_chain_keeps_its_options_and_fails_if_it_ends_before_the_run(
    cluster: Cluster, data: Path
):
    """In a folder with a space, and with next to nothing exported."""
    run = data.parent / "a run%j"
    settings = (*SETTINGS, f"data.path={data}", f"output={run}", "data.workers=0")
    exported = "--export=SLURM_CONF,TEST_SECONDS_A_STEP,WANDB_MODE"
    told = cluster.command(
        *(sys.executable, SUBMIT, "s", "--recipe", "mnist", "--nodes", "1", *settings),
        *("--gpus-per-node", "2", "--cpus-per-task", "1", "--chain", "2"),
        *("--sbatch", "--gres=gpu:2 --constraint=fast", "--sbatch", exported),
        TEST_SECONDS_A_STEP="0.15",
        WANDB_MODE="disabled",
        DIFFMOE_RECIPE="another",
    )
    jobs = [Job(cluster, number) for number in re.findall(r"job (\d+)", told)]
    assert jobs[1].field("Dependency").startswith(f"afterok:{jobs[0].number}")
    assert len(list((run / "submitted").glob("*.sh"))) == 1
    assert f"tail -F {run}/submitted/*-{jobs[0].number}.out" in told
    for job in jobs:
        assert (job.field("Features"), job.field("TresPerNode")) == ("fast", "gres:gpu:2")
        before = steps(run)
        job.wait_for(partial(lambda n: steps(run) > n, before + 2), "steps")
        job.signal_as_before_a_limit()
        job.end()
    logs = [(run / f"submitted/diffmoe-s-{job.number}.out").read_text() for job in jobs]
    assert jobs[0].field("JobState") == "COMPLETED", logs[0]
    assert "job 1/2 of the chain ends; the next one resumes" in logs[0]
    assert jobs[1].field("JobState") == "FAILED", logs[1]
    assert jobs[1].field("ExitCode") == "85:0"
    assert (
        f"error: the chain's last job ends, and the run is not finished: {8 * steps(run)} of 480 "
        "samples; submit the same command again to resume"
    ) in logs[1]
