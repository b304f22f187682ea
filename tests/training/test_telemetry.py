"""What a run tells in metrics.jsonl."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, environment
from tests.helpers.runs import metrics, newest, pack, run_config, train


def test_metrics_hold_what_the_run_did(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(
        tmp_path, 4, logging__log_samples=16, parallel__expert_parallel=2, optimizer__eps=1e-3
    )
    train(config, world=2)
    lines = metrics(config)
    assert [(line["samples"], line["step"]) for line in lines] == [(16, 2), (32, 4)]
    assert set(lines[0]) == {
        "samples",
        "step",
        "loss",
        "mse",
        "routing_loss",
        "gradient_norm",
        "learning_rate",
        "skipped_steps",
        "bad_shards",
        "data_wait_seconds",
        "unselected_share",
        "capacity_loss",
        "expert_load",
        "thresholds",
        "gate_sum",
        "time_share",
        "expert_weight_similarity",
        "expert_output_similarity",
        "load_entropy",
        "dead_experts",
        "samples_per_second",
        "memory_gib",
    }
    for line in lines:
        assert line["loss"] == line["mse"]
        assert 0 < line["loss"] < 10
        assert 0 < line["gradient_norm"] < 100
        assert line["learning_rate"] == 0.01
        assert line["skipped_steps"] == 0
        assert line["samples_per_second"] > 0
        assert 0.01 < line["memory_gib"] < 8
        layers, experts = 2, 4
        for key in ("unselected_share", "capacity_loss"):
            assert len(line[key]) == layers
        for key in ("expert_load", "thresholds"):
            assert [len(row) for row in line[key]] == [experts] * layers
        # 4 experts take 16 of 64 tokens each: between none and three quarters are left.
        assert all(0 < share < 0.75 for share in line["unselected_share"])
        assert sum(line["capacity_loss"]) == pytest.approx(line["routing_loss"], abs=1e-6)
        assert all(0 < tau < 1 for row in line["thresholds"] for tau in row)
        assert all(0 <= load <= experts for row in line["expert_load"] for load in row)
    # Two steps after the start at tau = 0, every p is above tau: every expert wants every token.
    assert lines[0]["expert_load"] == [[4.0] * 4] * 2


def test_a_dense_model_reports_no_routing(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 1, moe__type="dense")
    train(config)
    assert "expert_load" not in metrics(config)[0]
    assert metrics(config)[0]["routing_loss"] == 0


def test_lines_after_the_resumed_clock_are_dropped(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 4, training__checkpoint_samples=16)
    train(config)
    before = metrics(config)
    path = Path(config.output) / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"samples": 3')  # torn by a kill
    train(config, resume=f"{config.output}/step-00000002")
    assert [line["samples"] for line in metrics(config)] == [8, 16, 24, 32]
    assert [line["loss"] for line in metrics(config)] == [line["loss"] for line in before]


def test_what_a_run_keeps_does_not_tell_where_its_shards_lie(tmp_path: Path):
    """The address may hold a password, and checkpoints are passed on."""
    pack(tmp_path / "data")
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    manifest["location"] = f"file:{tmp_path}/data/../data/{{}}"
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest))
    config = run_config(tmp_path, 1)
    train(config)
    for file in [newest(config) / "run.json", Path(config.output) / "config.yaml"]:
        assert "data/../data" not in file.read_text()


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing_of_it(tmp_path: Path):
    """As a full disk does, a limit on the size of files cuts a write short."""
    script = """
import resource, sys
from pathlib import Path
from diffmoe.training.telemetry import _append
path = Path(sys.argv[1])
_append(path, b"x" * 80 + b"\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    _append(path, b"y" * 80 + b"\\n")
except OSError:
    print(path.read_bytes() == b"x" * 80 + b"\\n")
"""
    words = [sys.executable, "-c", script, str(tmp_path / "lines")]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
