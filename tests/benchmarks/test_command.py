"""tools/benchmark.py on a network of toy size: what it writes, never how fast."""

import json
from pathlib import Path

import pytest
import torch

from diffmoe.benchmarks.gpu_check import Bench, Check, markdown
from diffmoe.benchmarks.layer import shape_of
from diffmoe.benchmarks.report import Report, read_aims
from diffmoe.errors import UserError
from diffmoe.recipes import load_config
from tests.helpers.devices import DEVICES
from tests.helpers.processes import ROOT, command
from tests.helpers.tiny import tiny_config
from tests.helpers.tools import forked

AIMS = ROOT / "diffmoe/benchmarks/aims"
COMMANDS = {
    "train": (
        ("--rounds", "1", "optimizer.type=muon"),
        [
            "Newton-Schulz: its operations",
            "part of the step: Newton-Schulz x 1",
            "diffmoe fp32: GEMM ceiling",
            "compiled: step",
            "compiled: its first step",
            "diffmoe fp32: share of the ceiling",
            "diffmoe to dense (target: 1.08 x their FLOPs)",
            "fp32 to bf16",
            "activation checkpointing: saved for backward",
            "phase of the step: data wait",
            "optimizer and EMA",
            "part of the step: attention x 4",
            "logging, a step's share",
        ],
    ),
    "step": (
        ("--rounds", "1", "--dtype", "bf16", "--expect", str(AIMS / "h100_l_e16.yaml")),
        ["diffmoe: MFU, of the GEMM's rate", "dense: memory's share", "diffmoe to dense"],
    ),
    "layer": (
        ("--rounds", "1"),
        [
            "E4 ratio 4: naive (ratio: ours to it)",
            "E64 ratio 0.5: DeepSpeed (ratio: ours to it)",
            "E64 ratio 0.5: routing, share of the layer",
            "E4 ratio 4: ours, saved for backward",
        ],
    ),
    "sample": (
        ("--rounds", "1", "--steps", "2"),
        ["capacity 0.5 to capacity 1", "capacity 1: MFU, of the GEMM's rate"],
    ),
    "ep": (("--rounds", "1"), ["P=2: step (ratio: to P=1)", "P=2: all_to_all, a step and rank"]),
    "data": (("--samples", "160", "--rounds", "1", "--workers", "0"), []),
}


def run(part: str, folder: Path, *options: str) -> dict:
    out, recipe = folder / "out.json", folder / "tiny.yaml"
    recipe.write_text(tiny_config().to_yaml())
    if part != "data":
        options = ("--recipe", str(recipe), "--threads", "1", *options)
    told = forked("tools/benchmark.py", part, "--json", out, *options)
    assert told.returncode == 0, told.stderr
    written = json.loads(out.read_text())
    for figure in written["figures"]:
        assert figure["name"] in told.stdout
    return written


@pytest.mark.slow
@pytest.mark.parametrize("part", COMMANDS)
def test_every_part_writes_its_figures(part: str, tmp_path: Path):
    options, names = COMMANDS[part]
    written = run(part, tmp_path, *options)
    assert {"command", "settings", "machine", "figures", "points", "notes"} == written.keys()
    assert {"threads", "load_average", "torch", "processor"} <= written["machine"].keys()
    figures = {figure["name"]: figure for figure in written["figures"]}
    assert set(names) <= figures.keys()
    for figure in written["figures"]:
        targets = figure["at_most"] is not None or figure["at_least"] is not None
        assert (figure["met"] is not None) == targets


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer", "--recipe", "ec_s_e16_flow"], "moe.type=expert_choice; the benchmark is of"),
        (["train", "--recipe", "captioned_digits"], "has classes, no captions"),
        (["layer", "--plot", "x.png"], "draws --growth; give both"),
        (["layer", "--growth", "--plot", "x.txt"], "must end in .png"),
        (["layer", "--growth", "--trace", "x.json"], "draws the layer, not --growth"),
        (["layer", "--json", "/proc/nowhere/x.json"], "/proc/nowhere cannot be written"),
        (["ep", "--batch", "7"], "--batch 7 must be a multiple"),
        (["step", "--expect", "/nowhere.yaml"], "cannot read --expect /nowhere.yaml"),
        (["step", "--expect", "README.md"], "--expect README.md"),
    ],
)
def test_what_cannot_be_measured_or_written_is_refused_at_once(words: list[str], message: str):
    told = forked("tools/benchmark.py", *words)
    assert told.returncode == 2
    assert message in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.slow
def test_the_check_of_a_gpu_is_rehearsed_line_by_line(tmp_path: Path):
    """In small sizes on a CPU; what --only leaves out other tests run."""
    only = ("tests", "training, bf16", "resume", "step of L-E16")
    done = command(
        *("bash", "tools/gpu_check.sh", "--device", "cpu", "--out", str(tmp_path)),
        *("--only", *only),
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    checks = {check["name"]: check for check in report["checks"]}
    assert {check["error"] for check in checks.values()} == {None}
    assert checks["tests"]["figures"]["passed"] > 40
    losses = checks["training, bf16"]["figures"]
    assert losses["and the last"] < losses["loss of the first line"]
    assert checks["resume, deterministic"]["figures"] == {
        "files of the last checkpoint that are equal": 2
    }
    assert checks["step of L-E16"]["figures"]["diffmoe to dense"]["ratio"] > 0
    assert len(checks) == len(only)
    page = (tmp_path / "report.md").read_text()
    assert all(f"## {name}" in page for name in checks)


def test_a_check_that_fails_is_told_and_does_not_end_the_others(tmp_path: Path):
    bench = Bench("cpu", tmp_path)
    failing = Check("one", lambda: {"said": bench.call("one", "-c", "print('why'); exit(3)")})
    fine = Check("two", lambda: {"said": bench.call("two", "-c", "print('fine')").strip()})
    checks = [failing.run(), fine.run()]
    assert "exit code 3" in checks[0].error
    assert "why" in checks[0].error
    assert (checks[1].error, checks[1].figures) == (None, {"said": "fine"})
    page = markdown({"gpu": "none"}, checks)
    assert "| one | FAILED |" in page
    assert "| said | fine" in page


def test_a_gpu_that_is_not_there_is_told():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = command("bash", "tools/gpu_check.sh", timeout=60)
    assert done.returncode == 2
    assert "torch sees no GPU; --device cpu rehearses the check" in done.stderr


@pytest.mark.slow
def test_growth_writes_points_slopes_and_a_picture(tmp_path: Path):
    picture = tmp_path / "growth.png"
    options = ("--growth", "--rounds", "1", "--largest", "256", "--plot", str(picture))
    written = run("layer", tmp_path, *options)
    assert {point["axis"] for point in written["points"]} == {"E", "D", "P"}
    slopes = {figure["name"]: figure["value"] for figure in written["figures"]}
    # Weights are not counted as saved; rows are as many whatever the number of experts.
    assert 0 <= slopes["saved_bytes against E, slope on log axes"] < 1
    assert 0 < slopes["saved_bytes against D, slope on log axes"] <= 1
    assert slopes["saved_bytes against P, slope on log axes"] == pytest.approx(0, abs=0.2)
    assert -1 < slopes["weight_bytes against P, slope on log axes"] < 0
    assert "seconds against E, slope on log axes" in slopes
    assert picture.stat().st_size > 10_000


def test_aims_of_a_file_take_the_place_of_targets_and_unknown_ones_are_named(tmp_path: Path):
    aims = tmp_path / "aims.yaml"
    report = Report("benchmark", {})
    report.add("speed", 3.0, "images/s", at_most=1.0)
    report.add("share", 8.0, "ms", 0.4)
    report.add("twice", 1.0, "calls")
    report.add("twice", 1.0, "MiB")
    aims.write_text("speed: {at_least: 2}\nshare: {at_least: 0.5}\n")
    report.expect(aims)
    assert [figure.met for figure in report.figures] == [True, False, None, None]
    assert {figure.at_most for figure in report.figures} == {None}
    assert "NOT met" in report.table()
    for text, message in (
        ("sped: {at_least: 2}", "no figure is called sped; there are share, speed, twice"),
        ("speed: 2", "speed: write at_least: NUMBER or at_most: NUMBER"),
        ("speed: {at_least: fast}", "'fast' is not a number"),
        ("twice: {at_least: 2}", "2 figures are called twice"),
        ("- speed", "must hold figures' names"),
    ):
        aims.write_text(text)
        with pytest.raises(UserError, match=message):
            report.expect(aims)


@pytest.mark.parametrize("aims", sorted(AIMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_aims_that_come_along_can_be_read(aims: Path):
    assert read_aims(aims)


def test_the_layers_aim_names_the_layer_of_the_default_recipe():
    name = f"{shape_of(load_config('diffmoe_s_e16_flow'))}: naive (ratio: ours to it)"
    assert read_aims(AIMS / "h100_layer.yaml") == {name: {"at_most": 0.5}}


@pytest.mark.parametrize(("part", "events"), [("step", "aten::_fused"), ("layer", "aten::bmm")])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
def test_a_trace_shows_one_call_and_a_gpus_use_is_counted(
    part: str, events: str, device: str, tmp_path: Path
):
    trace = tmp_path / "trace.json"
    written = run(part, tmp_path, "--device", device, "--rounds", "1", "--trace", str(trace))
    drawn = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert any(name.startswith(events) for name in drawn)
    kernels = [one["value"] for one in written["figures"] if one["name"].endswith(": kernels")]
    assert all(kernels)
    assert bool(kernels) == (device == "cuda")


@pytest.mark.slow
def test_what_was_measured_is_told_even_if_an_aim_has_a_wrong_name(tmp_path: Path):
    aims, out = tmp_path / "aims.yaml", tmp_path / "out.json"
    aims.write_text("sped: {at_least: 2}\n")
    told = forked(
        *("tools/benchmark.py", "data", "--samples", "160", "--rounds", "1", "--workers", "0"),
        *("--expect", aims, "--json", out),
    )
    assert told.returncode == 2
    assert "no figure is called sped; there are" in told.stderr
    assert "bare loop" in told.stdout
    assert json.loads(out.read_text())["figures"]
