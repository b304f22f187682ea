"""A study trains what its file says, continues after an interruption, and compares seed by seed."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from diffmoe.comparison.measured import (
    Measured,
    Point,
    Size,
    difference,
    measured,
    reached,
    size,
    table,
)
from diffmoe.comparison.running import check_runs
from diffmoe.comparison.study import Study, StudyRun, read_study, runs_of
from diffmoe.errors import UserError
from diffmoe.planning.estimate import plan
from diffmoe.planning.layouts import Layout
from diffmoe.planning.machine import Machine
from diffmoe.recipes import load_config
from tests.helpers.processes import ROOT, environment
from tests.helpers.runs import metrics, newest, pack, run_config
from tests.helpers.tools import forked

VARIANTS = {"dense": ["moe.type=dense"], "identity": ["moe.gate=identity"]}


def test_an_interval_is_students_of_the_paired_differences():
    differs = difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])  # 1, 2, 3: deviation 1
    assert differs.mean == pytest.approx(2.0)
    assert differs.half_width == pytest.approx(4.303 / math.sqrt(3), rel=1e-6)
    assert not differs.excludes_zero
    assert difference([2.0, 2.1], [1.0, 1.1]).excludes_zero
    assert difference([1.0], [0.0]).half_width == math.inf
    many = [float(k) for k in range(13)]  # deviation 3.8944 with 12 degrees of freedom
    wide = difference(many, [0.0] * 13).half_width
    assert wide == pytest.approx(2.179 * math.sqrt(13 * 14 / 12) / math.sqrt(13), rel=1e-6)


def test_the_table_compares_seeds_that_both_have():
    study = Study(config="mnist", variants=VARIANTS, reference="dense", seeds=[0, 1], output="x")
    found = {
        ("dense", 0): Measured([Point(8, 1.0, 0.5)], 0.0, None, 0.1, {}),
        ("dense", 1): Measured([Point(8, 1.0, 0.7)], 0.0, None, 0.1, {"FD": 3.0}),
        ("identity", 0): Measured([Point(8, 2.0, 0.4)], 1.5, 0.41, 0.2, {}),
    }
    sizes = {name: Size(2_000_000, 1_000_000, 3e9, 9e9) for name in VARIANTS}
    _, _, dense, identity = table(study, found, sizes).splitlines()
    assert dense.split(" | ")[1:4] == ["2", "0.60000", "-"]
    assert identity.split(" | ")[1:4] == ["1", "0.40000", "-0.10000 (-20.0%, one seed)"]
    assert identity.split(" | ")[4:7] == ["100% of samples, 200% of seconds", "1.500", "0.41"]
    assert dense.rstrip(" |").endswith("| 3.000 | 0.100 | 3")


def test_figures_of_images_are_compared_seed_by_seed_as_losses_are():
    study = Study(config="mnist", variants=VARIANTS, reference="dense", seeds=[0, 1, 2], output="x")
    dense = [{"FD": 200.0, "recall": 0.0}, {"FD": 220.0, "recall": 0.0}, {"FD": 210.0}]
    identity = [{"FD": 190.0, "recall": 0.5}, {"FD": 208.0}, {"FD": 199.0}]  # 10, 12, 11 lower
    found = {
        (name, seed): Measured([Point(8, 1.0, 0.5)], 0.0, None, 0.1, figures)
        for name, all_seeds in (("dense", dense), ("identity", identity))
        for seed, figures in enumerate(all_seeds)
    }
    sizes = {name: Size(2_000_000, 1_000_000, 3e9, 9e9) for name in VARIANTS}
    head, _, ours, theirs = (
        row[2:-2].split(" | ") for row in table(study, found, sizes).split("\n")
    )
    assert head[-2:] == ["FD", "recall"]
    assert ours[-2:] == ["210", "0"]
    # deviation 1, of three: 4.303 / sqrt(3)
    assert theirs[-2:] == ["199, -11 ± 2.48 (-5.2%) *", "0.5, +0.5 (from 0, one seed)"]


def test_samples_to_the_end_of_the_reference_are_between_the_points_of_a_curve():
    curve = [Point(10, 1.0, 0.9), Point(20, 3.0, 0.7), Point(30, 4.0, 0.3)]
    assert reached(curve, 0.5) == Point(25, 3.5, 0.5)
    assert reached(curve, 0.3) == Point(30, 4.0, 0.3)
    assert reached(curve, 0.95) == Point(10, 1.0, 0.95)  # the first that was measured
    assert reached(curve, 0.2) is None
    assert reached([Point(10, 1.0, math.nan), *curve[1:]], 0.8) == Point(20, 3.0, 0.8)

    study = Study(config="mnist", variants=VARIANTS, reference="dense", seeds=[0, 1], output="x")
    sizes = {name: Size(2_000_000, 1_000_000, 3e9, 9e9) for name in VARIANTS}
    ends = [Point(10, 1.0, 0.9), Point(30, 2.0, 0.5)]
    other = [Point(10, 1.0, 0.9), Point(30, 2.0, 0.3)]
    for second, told in ((other, "92% of samples, 188% of seconds"), (ends[:1], "-")):
        found = {
            ("dense", 0): Measured(ends, 0.0, None, 0.1, {}),
            ("dense", 1): Measured(other, 0.0, None, 0.1, {}),
            ("identity", 0): Measured(curve, 1.0, 0.4, 0.1, {}),
            ("identity", 1): Measured(curve if second is other else second, 1.0, 0.4, 0.1, {}),
        }
        assert table(study, found, sizes).splitlines()[3].split(" | ")[4] == told


@pytest.mark.parametrize("name", ["mnist", "captioned_digits", "photographs"])
def test_shipped_studies_compare_equal_work(name: str):
    """Within a tenth: what a router costs beside its experts is part of the comparison."""
    study = read_study(name)
    runs = runs_of(study)
    assert {run.seed for run in runs} == {0, 1, 2}
    first = {run.variant: size(run, run.config.moe.capacity) for run in runs if run.seed == 0}
    wide = first.pop("wide", None)  # the ceiling
    if wide is not None:
        assert wide.forward_flops > 2 * first["dense"].forward_flops
        assert wide.parameters == pytest.approx(first["softmax"].parameters, rel=0.03)
    for variant, of in first.items():
        assert of.forward_flops == pytest.approx(first["dense"].forward_flops, rel=0.12), variant
        if variant != "dense":
            assert of.parameters == pytest.approx(first["softmax"].parameters, rel=0.03), variant


def test_the_study_of_optimizers_changes_nothing_else():
    """Each of two optimizers at each of three rates, of a dense network and of its mixture."""
    found = set()
    runs = runs_of(read_study("optimizers"))
    alike = {"moe.type": "diffmoe", "seed": 0, "output": "x"}
    alike |= {"optimizer.type": "adamw", "optimizer.learning_rate": 1e-3}
    first = runs[0].config.replace(alike)
    for run in runs:
        optimizer = run.config.optimizer
        found.add((run.config.moe.type, optimizer.type, optimizer.learning_rate, run.seed))
        assert run.config.replace(alike) == first, run.variant
    rates = (2e-3, 4e-3, 8e-3)
    assert found == set(product(("dense", "diffmoe"), ("adamw", "muon"), rates, (0, 1, 2)))


@pytest.mark.parametrize(
    ("name", "optimizer", "rate"),
    [("mnist", "adamw", 3e-3), ("alignment", "adamw", 2e-3), ("photographs", "muon", 8e-3)],
)
def test_studies_keep_the_optimizer_that_their_figures_are_of(
    name: str, optimizer: str, rate: float
):
    taken = [run.config.optimizer for run in runs_of(read_study(name))]
    assert {(one.type, one.learning_rate) for one in taken} == {(optimizer, rate)}


def test_the_study_of_alignment_changes_nothing_else():
    """The same network on the same shards; a projector beside it, and what that costs."""
    runs = [run for run in runs_of(read_study("alignment")) if run.seed == 0]
    found = {run.variant: (run.config, size(run, 1.0)) for run in runs}
    plain, of_plain = found.pop("plain")
    assert plain.align.end == 0
    for config, of in found.values():
        assert config.replace({"align": {}, "output": plain.output}) == plain.replace({"align": {}})
        assert 1 < of.forward_flops / of_plain.forward_flops < 1.2
        assert of.parameters == of_plain.parameters
    assert {config.align.end for config, _ in found.values()} == {math.inf, 25600}


def test_the_cost_of_training_is_the_planners_and_less_where_parts_are_frozen():
    shape = ["model.depth=4", "training.activation_checkpointing=true", "optimizer.type=adamw"]
    variants = {
        "all": [],
        "head": ["training.train_only=[blocks.3.*, final.*]"],
        "lora": ["lora.rank=2", "training.init=x"],
        "muon": ["optimizer.type=muon"],
    }
    runs = {
        name: StudyRun(name, 0, load_config("mnist", [*shape, *more]))
        for name, more in variants.items()
    }
    sizes = {name: size(run, 1.0) for name, run in runs.items()}
    for name, run in runs.items():
        planned = plan(Layout(run.config, 1, 1), Machine()).flops
        assert sizes[name].training_flops * run.config.training.batch_size == planned, name
    cost = {name: of.training_flops / of.forward_flops for name, of in sizes.items()}
    # Forward, two for the backward and most of a forward again; of a head, its block's alone.
    assert 3.7 < cost["all"] < 4.05 < cost["muon"]
    assert 1.5 < cost["head"] < 2
    assert 2.7 < cost["lora"] < 3.2


def test_a_study_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(UserError, match="study mnst: there is none; choose alignment"):
        read_study("mnst")


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    pack(tmp_path / "data")
    pack(tmp_path / "held-out", [9, 11, 14], first=100)
    config = run_config(
        tmp_path,
        6,
        training__validate_every=16,
        validation__path=str(tmp_path / "held-out"),
        validation__samples=30,
    )
    (tmp_path / "base.yaml").write_text(config.to_yaml())
    file = tmp_path / "study.yaml"
    values = {
        "config": str(tmp_path / "base.yaml"),
        "variants": VARIANTS,
        "reference": "dense",
        "seeds": [0, 1],
        "output": str(tmp_path / "study"),
    }
    file.write_text(yaml.safe_dump(values))
    return file


def _processes_of(study: Study) -> list[Path]:
    """Those of its runs."""
    mine = f"{study.output}/configs".encode()
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mine in file.read_bytes():
                found.append(file)
    return found


@pytest.mark.slow
def test_a_study_trains_continues_and_reports(study_file: Path):
    tool = [sys.executable, "tools/compare.py", str(study_file)]
    study = read_study(study_file)
    runs = runs_of(study)
    assert [(run.variant, run.seed) for run in runs] == [
        ("dense", 0), ("identity", 0), ("dense", 1), ("identity", 1),
    ]  # fmt: skip
    started = subprocess.Popen(tool, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    while not _processes_of(study):
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.2)
    started.terminate()  # as `kill` does, or a scheduler: only the tool hears it
    said = started.communicate(timeout=90)[1]
    assert started.returncode == 85, said
    assert said.endswith("stopped; the same command continues\n")  # no table yet, which is no error
    assert "error" not in said
    assert not _processes_of(study)
    assert measured(runs[0]) is None

    started = subprocess.Popen(
        tool,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, as these tests may be, has its children ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while measured(runs[0]) is None:
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.2)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal's Ctrl-C
    assert started.wait(90) == 85, started.stderr.read()
    assert measured(runs[-1]) is None
    assert not _processes_of(study)

    done = forked(*tool[1:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dense, seed 0") == 0  # it was done
    stored = json.loads((study_file.parent / "study/table.json").read_text())["runs"]
    assert len(stored) == 4
    for run, line in zip(runs, stored, strict=True):
        last = metrics(run.config)[-1]
        assert (line["variant"], line["seed"]) == (run.variant, run.seed)
        assert line["curve"][-1][0] == 48
        assert line["curve"][-1][2] == last["validation_loss"]
        assert line["as_trained"] == last.get("validation_loss_training_routing")
        assert (line["as_trained"] is None) == (run.variant == "dense")
    losses = {(line["variant"], line["seed"]): line["curve"][-1][2] for line in stored}
    mean = fmean(losses["identity", seed] - losses["dense", seed] for seed in (0, 1))
    assert f"{mean:+.5f} ± " in (study_file.parent / "study/table.md").read_text()
    assert (study_file.parent / "study/curves.png").stat().st_size > 10_000
    assert len(set(losses.values())) == 4

    again = forked(*tool[1:], "--report")
    assert again.stdout == (study_file.parent / "study/table.md").read_text()

    # Killed after its last loss, before its last save: that run is trained again.
    shutil.rmtree(newest(runs[1].config))
    again = forked(*tool[1:])
    assert again.stdout.startswith("2 of 4: identity, seed 0\n")
    assert newest(runs[1].config).exists()
    assert again.stdout.endswith((study_file.parent / "study/table.md").read_text())

    # An edited file does not compare what was trained before.
    for edited, told in (
        ("optimizer.learning_rate=0.02", r"optimizer\.learning_rate: 0\.01 there, 0\.02 now"),
        ("validation.samples=29", r"measured with validation .*30.*29.* choose another output"),
    ):
        values = yaml.safe_load(study_file.read_text()) | {"overrides": [edited]}
        study_file.write_text(yaml.safe_dump(values))
        study = read_study(study_file)
        with pytest.raises(UserError, match=told):
            check_runs(study, runs_of(study))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reference": "tc"}, "reference=tc is none of the variants dense, identity"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] lists one twice"),
        ({"varients": {}}, "varients"),
        ({"variants": {"dense": [], "a/b": []}}, "'a/b' cannot name a folder"),
        ({"variants": {"dense": [], "more": ["training.batch_size=16"]}}, "the same samples"),
        ({"variants": {"dense": [], "wrong": ["moe.gates=identity"]}}, "unknown key moe.gates"),
        ({"overrides": ["training.validate_every=null"]}, "set training.validate_every"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(study_file: Path, changes, told: str):
    values = yaml.safe_load(study_file.read_text()) | changes
    study_file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=told):
        runs_of(read_study(study_file))
