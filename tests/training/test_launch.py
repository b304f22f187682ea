"""The launchers, as users start them; a failure reaches the terminal once."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.processes import TORCHRUN, TRAIN, command, deepspeed, write_config
from tests.helpers.runs import SAMPLES, metrics, newest, pack, run_config
from tests.helpers.tools import forked

pytestmark = pytest.mark.slow


def test_all_launchers_train_alike(tmp_path: Path):
    """With the global pool, one rank and two give the same losses to rounding."""
    pack(tmp_path / "data")
    ds_config = tmp_path / "zero1.json"
    ds_config.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 1}}))
    losses = {}
    for name, launcher, ranks, more in [
        ("python", [sys.executable, TRAIN], 1, []),
        ("torchrun", TORCHRUN, 2, []),
        ("deepspeed", deepspeed(), 2, ["--ds_config", str(ds_config)]),
    ]:
        config = run_config(
            tmp_path,
            3,
            output=str(tmp_path / name),
            moe__token_pool="global",
            parallel__expert_parallel=ranks,
            optimizer__eps=1e-3,
        )
        done = command(*launcher, "--config", write_config(config), "--device", "cpu", *more)
        assert done.returncode == 0, done.stderr
        assert newest(config).name == "step-00000003"
        losses[name] = [line["loss"] for line in metrics(config)]
    assert losses["torchrun"] == losses["deepspeed"]  # the same layout
    assert losses["python"] == pytest.approx(losses["torchrun"], abs=1e-6)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_one_ranks_failure_is_told_once_and_ends_the_run(tmp_path: Path, launcher: str):
    """A label outside the classes, which only the rank that reads that shard can see."""
    pack(tmp_path / "data", classes=7, wrong_label=(SAMPLES[0], 6))
    manifest = tmp_path / "data/manifest.json"
    manifest.write_text(manifest.read_text().replace('"classes": 7', '"classes": 5'))
    config = run_config(tmp_path, 1000, data__workers=1, parallel__expert_parallel=2)
    start = TORCHRUN if launcher == "torchrun" else deepspeed()
    done = command(*start, "--config", write_config(config), "--device", "cpu")
    assert done.returncode != 0
    told = done.stdout + done.stderr
    wanted = (
        f"error: shard {tmp_path}/data/000001.tar, sample 00007: label 6 is outside the classes "
        "0..4 of manifest.json (classes=5); fix the manifest or pack the data again"
    )
    assert told.count(wanted) == 1, told
    # Nothing of the other rank, whose collectives break off.
    assert "[rank " not in told, told


@pytest.mark.parametrize("wrong", ["json", "setting"])
def test_the_cause_is_told_before_the_launcher_ends_the_others(tmp_path: Path, wrong: str):
    """deepspeed ends all at the first exit, whichever rank it is that comes first."""
    pack(tmp_path / "data")
    config = run_config(tmp_path, 1, optimizer__gradient_clipping=1.0)
    words = ["--config", write_config(config), "--device", "cpu"]
    if wrong == "json":
        (tmp_path / "zero.json").write_text(json.dumps({"gradient_clipping": 7.0}))
        words += ["--ds_config", str(tmp_path / "zero.json")]
    else:
        words.append("model.dept=3")
    done = command(*deepspeed(), *words)
    told = done.stdout + done.stderr
    cause = "gradient_clipping=7.0 in" if wrong == "json" else "unknown key model.dept=3"
    assert told.count(cause) == 1, told


def test_a_wrong_setting_is_told_once_before_any_work(tmp_path: Path):
    pack(tmp_path / "data", [9, 9, 9])
    config = run_config(tmp_path, 1)
    done = command(*TORCHRUN, "--config", write_config(config), "--device", "cpu")
    assert done.returncode != 0
    assert done.stderr.count("error: data.lanes=4 does not fit the 3 shards of the data") == 1
    assert "exitcode  : 2" in done.stderr  # as torchrun reports it; its own is always 1
    assert "[rank " not in done.stderr
    assert not Path(config.output).exists()


def test_a_crash_of_one_rank_is_told_with_its_traceback(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 1000)
    crash = tmp_path / "crash.py"
    crash.write_text(
        "import os, sys\n"
        "from diffmoe.training.step import TrainingStep\n"
        "run = TrainingStep.run\n"
        "def broken(step, *arguments, **options):\n"
        "    if os.environ['RANK'] == '1' and step.samples == 16:\n"
        "        raise ZeroDivisionError('a bug')\n"
        "    return run(step, *arguments, **options)\n"
        "TrainingStep.run = broken\n"
        "import train\n"
        "sys.exit(train.main())\n"
    )
    done = command(*TORCHRUN[:-1], str(crash), "--config", write_config(config), "--device", "cpu")
    assert done.returncode != 0
    assert done.stderr.count("ZeroDivisionError: a bug") == 1, done.stderr
    assert "[rank 1] Traceback" in done.stderr
    assert "[rank 0]" not in done.stderr


def test_print_config_shows_the_resolved_settings_and_stops(tmp_path: Path):
    done = forked("train.py", "--config", "mnist", "--print-config", "model.depth=2", "seed=7")
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert (shown["model"]["depth"], shown["seed"], shown["output"]) == (2, 7, "runs/mnist")
    assert shown["optimizer"]["eps"] == 1e-8  # a default
    assert "# The DiT backbone.\nmodel:\n" in done.stdout


def test_help_tells_the_ways_to_start(tmp_path: Path):
    done = command(sys.executable, TRAIN, "--help")
    assert done.returncode == 0
    for part in ("torchrun --nproc_per_node 2", "deepspeed train.py", "--resume", "code 85"):
        assert part in done.stdout
