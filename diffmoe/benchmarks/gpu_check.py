"""The first minutes on a GPU: tests, training, speed and memory, in one report.

Every check is a command that a user could type. What is right is checked first, several commands at
a time; what is measured follows, one command at a time. A check that fails does not end the others.
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from diffmoe.benchmarks.report import machine
from diffmoe.checkpoints.checksums import read_checksums
from diffmoe.errors import UserError, run_command
from diffmoe.files import read_text, write_atomically
from diffmoe.work import ensure_writable

ROOT = Path(__file__).parents[2]
# Where tests take a device; on a CPU some of them are rehearsal enough.
ROOMS = ("benchmarks", "models", "parallel", "sampling", "training")
TESTED = {
    "cuda": ["-m", "gpu", *(f"tests/{room}" for room in ROOMS)],
    "cpu": ["-k", "cpu", "tests/models/test_release.py", "tests/sampling/test_dtype.py"],
}
SMALL = ["model.width=32", "model.depth=2", "model.heads=2", "model.input_size=8", "moe.experts=4"]


class CheckFailed(Exception):
    """With what the command said."""


@dataclass
class Check:
    """seconds: that it took. figures: what it found, by name. error: why it failed."""

    name: str
    work: Callable[[], dict[str, Any]] = field(repr=False)
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def run(self) -> "Check":
        began = time.monotonic()
        try:
            self.figures = self.work()
        except (CheckFailed, UserError) as error:
            self.error = str(error)
        self.seconds = time.monotonic() - began
        state = "ok" if self.error is None else "FAILED"
        print(f"{self.name}: {state}, {self.seconds:.0f} s", flush=True)
        return self


@dataclass
class Bench:
    """Where the checks work, and on what."""

    device: str
    folder: Path

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    def call(self, name: str, *arguments: str, seconds: float = 240) -> str:
        """A Python command's output, which also goes to NAME.log. Raises CheckFailed."""
        log = self.folder / f"{name}.log"
        with log.open("w") as out:
            try:
                done = subprocess.run(
                    [sys.executable, *arguments],
                    cwd=ROOT,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                )
                code: object = done.returncode
            except subprocess.TimeoutExpired:
                code = f"none after {seconds:g} seconds"
        said = log.read_text(errors="replace")
        if code != 0:
            raise CheckFailed(f"{' '.join(arguments)}: exit code {code}\n{said[-1500:]}")
        return said

    # What is right ---------------------------------------------------------------------------

    def tests(self) -> dict[str, Any]:
        side_by_side = ["-n", "8"] if find_spec("xdist") and not self.small else []
        options = ["-p", "no:cacheprovider", *side_by_side, *TESTED[self.device]]
        said = self.call("tests", "-m", "pytest", *options)
        counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|skipped)", said)}
        if not counts.get("passed"):
            raise CheckFailed(f"no test ran: {said[-500:]}")
        return counts

    def data(self) -> Path:
        folder = self.folder / "mnist"
        if not (folder / "manifest.json").exists():
            self.call("data", "tools/prepare_data.py", "mnist", "--out", str(folder))
        return folder

    def training(self, output: str, *settings: str) -> list[str]:
        return [
            "train.py",
            *("--config", "mnist", "--device", self.device, f"data.path={self.folder / 'mnist'}"),
            *("logging.wandb=false", f"output={self.folder / output}"),
            *([*SMALL[:3], "training.batch_size=32"] if self.small else []),
            f"training.total_samples={640 if self.small else 25600}",
            f"training.checkpoint_samples={320 if self.small else 12800}",
            f"logging.log_samples={320 if self.small else 2560}",
            *settings,
        ]

    def trained(self, precision: str) -> dict[str, Any]:
        output = f"run-{precision}"
        self.call(output, *self.training(output, f"training.precision={precision}"))
        lines = [json.loads(line) for line in _lines(self.folder / output / "metrics.jsonl")]
        return {"loss of the first line": lines[0]["loss"], "and the last": lines[-1]["loss"]}

    def resumed(self) -> dict[str, Any]:
        """A deterministic run, and one that is stopped on its way: the same bits."""
        settings = ("training.deterministic=true", "training.precision=bf16")
        self.call("whole", *self.training("whole", *settings))
        command = self.training("stopped", *settings)
        self._stop_on_its_way(command)
        self.call("resumed", *command)
        whole, resumed = (_checksums(self.folder / name) for name in ("whole", "stopped"))
        if whole != resumed:
            differing = [name for name in whole if whole[name] != resumed.get(name)]
            raise CheckFailed(f"a resumed run differs from a whole one in {', '.join(differing)}")
        return {"files of the last checkpoint that are equal": len(whole)}

    def _stop_on_its_way(self, command: list[str]) -> None:
        with (self.folder / "stopped.log").open("w") as log:
            run = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
            lines = self.folder / "stopped" / "metrics.jsonl"
            deadline = time.monotonic() + 120
            while not lines.exists() and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            run.send_signal(signal.SIGTERM)
            try:
                code = run.wait(60)
            except subprocess.TimeoutExpired:
                run.kill()
                code = None
        if code != 85:
            raise CheckFailed(f"SIGTERM should have ended the run with code 85, it was {code}")

    # What is measured ------------------------------------------------------------------------

    def measured(self, name: str, part: str, recipe: str, *settings: str) -> dict[str, Any]:
        out = self.folder / f"{name}.json"
        batch, rounds = ("8", "1") if self.small else ("64", "3")
        self.call(
            name,
            *("tools/benchmark.py", part, "--recipe", recipe, "--device", self.device),
            *("--json", str(out), "--batch", batch, "--rounds", rounds),
            *("training.precision=bf16", *(SMALL if self.small else []), *settings),
        )
        figures = json.loads(out.read_text())["figures"]
        return {one["name"]: {k: one[k] for k in ("value", "unit", "ratio")} for one in figures}

    def checks(self) -> tuple[list[Check], list[Check]]:
        """Those that may run side by side, and those that must run alone."""
        small_l = "diffmoe_s_e16_flow" if self.small else "diffmoe_l_e16_flow"
        right = [
            Check("tests", self.tests),
            *(Check(f"training, {p}", partial(self.trained, p)) for p in ("fp32", "bf16")),
            Check("resume, deterministic", self.resumed),
        ]
        measured = [
            ("step of S-E16", "step", "diffmoe_s_e16_flow", []),
            ("step of S-E16, deterministic", "step", "diffmoe_s_e16_flow", ["deterministic"]),
            ("step of L-E16", "step", small_l, []),
            ("step of L-E16, compiled", "step", small_l, ["compile"]),
            ("layer of S-E16", "layer", "diffmoe_s_e16_flow", []),
            ("sampling of S-E16", "sample", "diffmoe_s_e16_flow", []),
        ]
        alone = [
            Check(
                name,
                partial(
                    self.measured,
                    name.replace(" ", "-").replace(",", ""),
                    part,
                    recipe,
                    *(f"training.{setting}=true" for setting in settings),
                ),
            )
            for name, part, recipe, settings in measured
            if not (self.small and "compile" in settings)  # takes a compiler, and minutes
        ]
        return right, alone


def _lines(path: Path) -> list[str]:
    return read_text(path).splitlines()


def _checksums(run: Path) -> dict[str, str]:
    """Of what the newest checkpoint holds of tensors."""
    newest = run / read_text(run / "latest").strip()
    files = read_checksums(newest)
    return {name: entry["sha256"] for name, entry in files.items() if name != "run.json"}


def markdown(about: dict[str, Any], checks: list[Check]) -> str:
    """The report, for a reader."""
    lines = ["# GPU check", "", *(f"- {key}: {value}" for key, value in about.items())]
    lines += ["", "| check | | seconds |", "|---|---|---|"]
    for check in checks:
        lines.append(
            f"| {check.name} | {'FAILED' if check.error else 'ok'} | {check.seconds:.0f} |"
        )
    for check in checks:
        lines += ["", f"## {check.name}", ""]
        if check.error:
            lines += ["```", check.error, "```"]
            continue
        lines += ["| figure | value | ratio |", "|---|---|---|"]
        for name, figure in check.figures.items():
            told = figure if isinstance(figure, dict) else {"value": figure, "unit": ""}
            ratio = "" if told.get("ratio") is None else f"{told['ratio']:.3f}"
            lines.append(f"| {name} | {_number(told['value'])} {told['unit']} | {ratio} |")
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check.sh",
        description="Tests, short runs and benchmarks on a GPU, and what they found as report.md "
        "and report.json. About six minutes on an H100; with --device cpu a rehearsal of every "
        "line in small sizes. Exit code 1 if a check failed.",
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="default cuda; cpu: a rehearsal"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu_check"),
        help="folder of the report; default gpu_check",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="checks whose names begin so; default all"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU; --device cpu rehearses the check")
    ensure_writable(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.device, Path(folder))
        right, alone = (
            [check for check in some if check.name.startswith(tuple(options.only or [""]))]
            for some in bench.checks()
        )
        bench.data()
        with ThreadPoolExecutor(1 if bench.small else 4) as side_by_side:
            checks = list(side_by_side.map(Check.run, right))
        checks += [check.run() for check in alone]
        for log in Path(folder).glob("*.log"):
            shutil.copy(log, options.out)
    told = [{key: value for key, value in vars(check).items() if key != "work"} for check in checks]
    report = json.dumps({"machine": about, "checks": told}, indent=1) + "\n"
    write_atomically(options.out / "report.json", report)
    write_atomically(options.out / "report.md", markdown(about, checks))
    print(f"report: {options.out / 'report.md'}")
    if any(check.error for check in checks):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
