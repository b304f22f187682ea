"""The held-out loss afterwards: what training recorded, of checkpoints, averages, exports."""

import importlib.util
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from diffmoe.checkpoints.folder import names
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.evaluation import held_out, loss
from diffmoe.evaluation.curves import curve_points
from diffmoe.evaluation.held_out import HeldOut
from diffmoe.evaluation.results import read
from diffmoe.export.sources import checkpoint_source
from diffmoe.export.writing import write_exported
from diffmoe.sampling.sampler import Sampler
from tests.helpers.processes import ROOT
from tests.helpers.runs import metrics, newest, pack, run_config, train

SAMPLES, SEED = 22, 3  # three batches of 8
RUNS = {
    "diffmoe": {"training__snapshot_samples": 8, "training__snapshot_precision": "fp32"},
    "dense": {"moe__type": "dense"},
    "bf16": {"training__precision": "bf16"},
}


def small_batches(rank: int = 0) -> None:
    from diffmoe.training import validation

    held_out.BATCH = validation.BATCH = 8


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(held_out, "BATCH", 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loss")
    pack(folder / "data")
    pack(folder / "held-out", [9, 11, 14], first=100)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path):
    """A run of each kind, trained when it is asked for: checkpoints at 16 and 32 samples."""
    done: dict[str, Config] = {}

    def run(kind: str = "diffmoe") -> Config:
        if kind not in done:
            values = {
                "output": str(folder / kind),
                "seed": SEED,
                "training__validate_every": 8,
                "training__checkpoint_samples": 16,
                "validation__path": str(folder / "held-out"),
                "validation__samples": SAMPLES,
                **RUNS[kind],
            }
            done[kind] = run_config(folder, 4, **values)
            train(done[kind], prepare=small_batches)
        return done[kind]

    return run


def evaluate(*words: str | Path) -> None:
    """tools/evaluate.py in this process."""
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "tools/evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = module.parse([*map(str, words), "--device", "cpu"])
    options.command(options)


def opened(path: str | Path, weights: str = "ema", routing: str | None = None) -> Sampler:
    sampler = Sampler.open(path, weights, with_autoencoder=False)
    return sampler.with_capacity(None, routing)


def measured(path: str | Path, file: Path, routing: str | None = None, **changes) -> dict:
    """changes: weights, and of the configuration, with '__' for the dot."""
    sampler = opened(path, changes.pop("weights", "ema"), routing)
    config = sampler.config.replace({k.replace("__", "."): v for k, v in changes.items()})
    return loss.measure_once(sampler, config, file)


@pytest.mark.parametrize("kind", RUNS)
def test_it_is_what_training_recorded(trained, kind: str, tmp_path: Path):
    config = trained(kind)
    recorded = {line["samples"]: line for line in metrics(config)}
    ways = [(None, "")] if kind == "dense" else [(None, ""), ("static", "_training_routing")]
    for step, samples in ((2, 16), (4, 32)):
        line = recorded[samples]
        for weights, suffix in (("ema", ""), ("live", "_live")):
            for routing, end in ways:
                path = Path(config.output) / f"step-{step:08d}"
                found = measured(path, tmp_path / "r.jsonl", routing, weights=weights)
                expected = line[f"validation_loss{suffix}{end}"]
                assert found["metrics"] == {"validation_loss": pytest.approx(expected, rel=1e-6)}
                assert found["clock"]["samples"] == samples
                assert found["warnings"] == []
        found = measured(path, tmp_path / "r.jsonl")
        assert found["by_time"] == pytest.approx(line["validation_by_time"], rel=1e-6)
        capacity = line["validation_capacity"]
        assert found["capacity_measured"] == (None if kind == "dense" else pytest.approx(capacity))
    assert len(read(tmp_path / "r.jsonl")) == 4 * len(ways)


def test_an_export_gives_it_too(trained, folder: Path, tmp_path: Path):
    config, file = trained(), tmp_path / "r.jsonl"
    for weights, suffix in (("ema", ""), ("live", "_live")):
        with checkpoint_source(Path(config.output), weights) as source:
            write_exported(source, tmp_path / weights)
        asked = {"validation__path": str(folder / "held-out"), "validation__samples": SAMPLES}
        found = measured(tmp_path / weights, file, **asked, seed=SEED)
        expected = metrics(config)[-1][f"validation_loss{suffix}"]
        assert found["metrics"]["validation_loss"] == pytest.approx(expected, rel=1e-6)
        assert found["held_out"]["model"]["weights"] == weights
        assert found["clock"]["samples"] == 32
        assert "not checked" in found["warnings"][0]  # an export does not tell its data
        other = measured(tmp_path / weights, file, **asked)["metrics"]["validation_loss"]
        assert other != pytest.approx(expected, rel=1e-4)  # of seed 0
        with pytest.raises(UserError, match=r"validation\.path=None is not a folder; give --data"):
            measured(tmp_path / weights, file)


def test_every_snapshot_makes_a_table_and_a_curve(trained, tmp_path: Path, capsys):
    config = trained()
    recorded = {line["samples"]: line for line in metrics(config)}
    evaluate("loss", config.output, "--every-snapshot", "--out", tmp_path)
    head, *rows, by_time, of = capsys.readouterr().out.splitlines()
    assert head.split() == ["samples", "validation_loss", "C"]
    assert [row.split() for row in rows] == [
        [str(n), f"{line['validation_loss']:.6f}", f"{line['validation_capacity']:.3f}"]
        for n, line in sorted(recorded.items())
    ]
    assert len(rows) == 4  # two checkpoints, and two averages alone
    assert by_time.endswith(" ".join(f"{x:.4f}" for x in recorded[32]["validation_by_time"]))
    assert "22 samples" in of
    assert "step-00000004, ema weights, routing per_token, fp32" in of
    assert Image.open(tmp_path / "validation_loss.png").size == (840, 540)
    name, drawn = curve_points([tmp_path], "validation_loss", "samples")
    assert name == "validation_loss"
    (points,) = drawn.values()
    assert [x for x, _ in points] == [8, 16, 24, 32]
    expected = [line["validation_loss"] for _, line in sorted(recorded.items())]
    assert [y for _, y in points] == pytest.approx(expected, rel=1e-6)


def test_the_type_is_the_run_s_unless_another_is_chosen(trained, folder: Path, tmp_path: Path):
    config, other = trained("bf16"), ["--dtype", "fp32"]
    with checkpoint_source(Path(config.output), "ema") as source:
        write_exported(source, tmp_path / "model")
    data = ["--data", folder / "held-out", "--samples", SAMPLES, "--seed", SEED]
    for words in ([config.output], [config.output, *other], [tmp_path / "model", *data]):
        evaluate("loss", *words, "--out", tmp_path)
    found = read(tmp_path)
    assert [one["held_out"]["precision"] for one in found] == ["bf16", "fp32", "fp32"]
    values = [one["metrics"]["validation_loss"] for one in found]
    assert values[0] == pytest.approx(metrics(config)[-1]["validation_loss"], rel=1e-6)
    assert values[1] != values[0]
    assert values[2] == pytest.approx(values[1], rel=1e-6)  # a converted model's on a CPU


def test_live_weights_are_of_checkpoints_alone(trained, tmp_path: Path, capsys):
    config = trained()
    words = ["--every-snapshot", "--out", tmp_path, "--weights", "live", "--routing", "static"]
    evaluate("loss", config.output, *words)
    rows = [row.split()[:2] for row in capsys.readouterr().out.splitlines()[1:3]]
    key = "validation_loss_live_training_routing"
    assert rows == [[str(8 * n), f"{metrics(config)[n - 1][key]:.6f}"] for n in (2, 4)]


def test_interrupted_it_keeps_what_it_has_and_measures_the_rest(
    trained, tmp_path: Path, capsys, monkeypatch
):
    words = ["loss", trained().output, "--every-snapshot", "--out", tmp_path]
    measure, calls = HeldOut.measure, []

    def counted(self, network):
        calls.append(network)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, network)

    monkeypatch.setattr(HeldOut, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*words)
    assert [line["clock"]["samples"] for line in read(tmp_path)] == [8, 16]
    capsys.readouterr()
    evaluate(*words)
    assert len(calls) == 5
    assert [line["clock"]["samples"] for line in read(tmp_path)] == [8, 16, 24, 32]
    told = capsys.readouterr()
    assert [row.split()[0] for row in told.out.splitlines()[1:5]] == ["8", "16", "24", "32"]
    assert told.err.count("was measured before") == 2
    evaluate(*words, "--seed", "7")  # another question
    assert len(calls) == 9


def test_what_is_damaged_or_gone_is_reported_and_skipped(trained, tmp_path: Path):
    config = trained()
    run = shutil.copytree(config.output, tmp_path / "run")
    assert names(run, "ema")
    (run / "step-00000002" / "run.json").unlink()
    shutil.rmtree(run / "ema-00000003")
    told: list[str] = []
    first = [f"ema-0000000{step}" for step in (1, 2)]
    assert [path.name for path in loss.stored(run, "ema", told.append)] == [*first, "step-00000004"]
    assert len(told) == 1
    assert "step-00000002 is skipped: " in told[0]
    found = loss.stored(run, "live")
    shutil.rmtree(run / "step-00000004")  # before its turn
    with pytest.raises(UserError, match="holds no complete checkpoint with live weights"):
        list(found)


def test_what_cannot_be_measured_is_refused(trained, folder: Path, tmp_path: Path):
    path, file = newest(trained()), tmp_path / "r.jsonl"

    def refused(**changes) -> str:
        with pytest.raises(UserError) as caught:
            measured(path, file, **changes)
        return str(caught.value)

    assert "validation.path: absent does not exist; give --data" in refused(
        validation__path="absent"
    )
    assert "validation.samples=35: " in refused(validation__samples=35)
    other = pack(tmp_path / "other", [9], first=100, shape=(3, 8, 8))
    assert "latents of shape 3x8x8, " in refused(validation__path=str(other))
    assert f"{path} takes 2x8x8; give --data" in refused(validation__path=str(other))
    classes = pack(tmp_path / "classes", [30], first=100, classes=7)
    assert "classes=7, but model.num_classes=5" in refused(validation__path=str(classes))
    data = shutil.copytree(folder / "data", tmp_path / "copied")
    assert f"holds the data that {path} was trained on" in refused(validation__path=str(data))
    part = pack(tmp_path / "part", [7, 5])
    assert "its shard 000000.tar is one of data.path=" in refused(validation__path=str(part))
    assert not file.exists()


def test_data_that_is_scaled_otherwise_or_unknown_is_warned_of(trained, tmp_path: Path):
    other = pack(tmp_path / "other", [9, 11, 14], first=100, scale=0.5)
    sampler = opened(newest(trained()))
    sampler = replace(sampler, config=sampler.config.replace({"data.path": "absent"}))
    config = sampler.config.replace({"validation.path": str(other)})
    found = loss.measure_once(sampler, config, tmp_path / "r.jsonl")
    assert found["warnings"] == [
        f"scale of the latents is 0.5 in {other}, 1.0 in the model",
        f"not checked that {other} was not trained on: the model's training data is missing",
    ]
    assert loss.details(found).count("\nwarning: ") == 2


def test_a_loss_that_is_not_finite_is_recorded_as_null(trained, tmp_path: Path):
    sampler = opened(newest(trained()))
    next(sampler.network.parameters()).data.fill_(math.nan)
    found = loss.measure_once(sampler, sampler.config, tmp_path / "r.jsonl")
    assert json.loads((tmp_path / "r.jsonl").read_text())["metrics"] == {"validation_loss": None}
    assert loss.row(found).split()[:3] == ["32", "not", "finite"]
    assert loss.details(found).startswith(f"by tenths of the time, from noise to data: {'- ' * 9}-")
    loss.plot([found], "run", tmp_path / "curve.png")
    with pytest.raises(UserError, match="no result of a model has validation_loss"):
        curve_points([tmp_path / "r.jsonl"], "validation_loss", "samples")


def test_curves_split_what_does_not_compare(trained, tmp_path: Path):
    path, file = newest(trained()), tmp_path / "r.jsonl"
    values = [
        measured(path, file, routing, weights=weights)["metrics"]["validation_loss"]
        for weights, routing in (("ema", None), ("live", None), ("ema", "static"))
    ]
    _, drawn = curve_points([file], "validation_loss", "samples")
    assert list(drawn.values()) == [[(32, value)] for value in values]
    assert [label.partition(": ")[2] for label in drawn] == [
        "routing per_token, weights ema",
        "routing per_token, weights live",
        "routing static, weights ema",
    ]
    with pytest.raises(UserError, match="a loss no guidance"):
        curve_points([file], "validation_loss", "guidance")
    measured(path, file, seed=5)
    with pytest.raises(UserError, match="different references cannot be compared: 22 samples of "):
        curve_points([file], "validation_loss", "samples")
