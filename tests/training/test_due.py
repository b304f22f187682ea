"""What is due at a clock is done, also if a kill came right after that clock's checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from diffmoe.checkpoints.checksums import find_damage
from diffmoe.checkpoints.folder import names
from diffmoe.config import Config
from diffmoe.evaluation import results
from diffmoe.training import history
from diffmoe.training.due import due
from diffmoe.training.resume import find_checkpoint
from tests.helpers.pictures import NAME, pictures, write_files
from tests.helpers.processes import killed
from tests.helpers.runs import assert_identical, newest, pack, run_config, tensors, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Config:
    """Four steps on two ranks; a checkpoint, a snapshot and an evaluation after every second."""
    folder = tmp_path_factory.mktemp("due")
    pack(folder / "data", shape=(3, 8, 8))
    write_files(folder / "real", pictures(20))
    config = run_config(
        folder,
        4,
        model__in_channels=3,
        training__checkpoint_samples=16,
        training__snapshot_samples=16,
        training__evaluate_every=16,
        evaluation__num_samples=13,
        evaluation__batch=3,
        evaluation__steps=2,
        evaluation__reference=str(folder / "real"),
        evaluation__extractor=NAME,
        evaluation__classifier="tests.helpers.pictures:brightest_channel",
        parallel__expert_parallel=2,
    )
    assert train(config, world=2) == [True] * 2
    return config


@pytest.fixture
def run(tmp_path: Path, trained: Config) -> Config:
    shutil.copytree(trained.output, tmp_path / "run")
    return trained.replace({"output": str(tmp_path / "run")})


def figures(config: Config) -> list[tuple[int, dict[str, float]]]:
    return [(r["clock"]["samples"], r["metrics"]) for r in results.read(Path(config.output))]


def undo(config: Config, step: int) -> None:
    """As if a kill had come right after this step's checkpoint."""
    output = Path(config.output)
    shutil.rmtree(output / f"ema-{step:08d}")
    history.keep(output / "evaluation/results.jsonl", lambda r: r["clock"]["step"] != step)
    (output / f"evaluation/samples-{step:08d}.png").unlink()


@pytest.mark.slow
def test_what_a_kill_prevented_is_done_first(run: Config, trained: Config):
    """Here after the last step, where no training is left to be done."""
    undo(run, 4)
    found = find_checkpoint(run, "auto")
    assert (found.checkpoint, found.missed) == (newest(run), {"ema", "evaluation"})
    assert train(run, world=2) == [True] * 2
    assert figures(run) == figures(trained)
    output, whole = Path(run.output), Path(trained.output)
    assert find_damage(output / "ema-00000004") == []
    assert_identical(tensors(output / "ema-00000004"), tensors(whole / "ema-00000004"))
    pictures = [folder / "evaluation/samples-00000004.png" for folder in (output, whole)]
    with Image.open(pictures[0]) as made, Image.open(pictures[1]) as expected:
        assert made.tobytes() == expected.tobytes()
    assert find_checkpoint(run, "auto").missed == set()


def test_in_the_middle_the_run_stays_the_same(run: Config, trained: Config):
    """A rollback: what was evaluated later comes again, and stands there once."""
    undo(run, 2)
    older = f"{run.output}/step-00000002"
    assert train(run, world=2, resume=older) == [True] * 2
    assert figures(run) == figures(trained)
    assert names(Path(run.output), "ema") == ["ema-00000002", "ema-00000004"]
    assert_identical(tensors(newest(run)), tensors(newest(trained)))


def test_another_output_owes_nothing(run: Config, tmp_path: Path):
    undo(run, 4)
    fork = run.replace({"output": str(tmp_path / "fork"), "training.total_samples": 64})
    assert find_checkpoint(fork, f"{run.output}/step-00000004").missed == set()


def test_all_periods_and_the_end(trained: Config):
    config = trained.replace({"training.evaluate_every": 24, "training.snapshot_samples": 40})
    found = [due(config, clock, clock + 8) for clock in range(0, 32, 8)]
    assert found == [set(), {"step"}, {"evaluation"}, {"step", "evaluation"}]


def test_figures_of_one_evaluation_are_written_together(tmp_path: Path):
    """A kill leaves all of them or none, so that what is there is not done twice."""
    file = tmp_path / "results.jsonl"
    lines = [{"metrics": {"a": 1}}, {"metrics": {"b": 2}}]
    assert killed(lambda: results.append(file, *lines), results.os, "fsync", 1)
    assert results.read(file) == lines


GARBAGE = {
    "torn": b'{"samples": 3',
    "torn inside a letter": '{"samples": 3, "say": "\u00e9'.encode()[:-1],
    "not UTF-8": b"\xff\xfe\n",
    "a list": b"[1]\n",
    "a number": b"7",
    "no clock": b"{}\n",
    "a clock that is a word": b'{"samples": "x"}\n',
    "null": b'{"samples": null}\n',
    "NaN": b'{"samples": NaN}\n',
    "deep": b"[" * 10**5,
    "zeros": b"\0" * 4096,
    "a long number": b"9" * 10**4,
}


def test_metrics_may_end_in_anything(tmp_path: Path):
    from diffmoe.training.telemetry import Telemetry

    file = tmp_path / "metrics.jsonl"
    good = [json.dumps({"samples": samples}).encode() + b"\n" for samples in (8, 16, 24)]
    for name, garbage in GARBAGE.items():
        file.write_bytes(b"".join(good) + garbage)
        telemetry = Telemetry.__new__(Telemetry)
        telemetry.path = file
        telemetry._forget_after(16)
        assert file.read_bytes() == b"".join(good[:2]), name
