"""Trains what a study still lacks, one run after another. Interrupted at any time, it continues."""

import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from diffmoe.checkpoints.folder import find_complete, names
from diffmoe.checkpoints.run_file import read_run_file
from diffmoe.comparison.measured import evaluations, measured
from diffmoe.comparison.study import Study, StudyRun
from diffmoe.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from diffmoe.training import preflight
from diffmoe.training.resume import check_configuration
from diffmoe.training.signals import SIGNALS


def check_runs(study: Study, runs: list[StudyRun]) -> None:
    """Raise UserError for what any run would be refused for, before the first one is trained.

    Runs that are there already must be the study's: a file that was edited since then would
    compare what it does not say.
    """
    for run in runs:
        preflight.check(run.config, {}, study.ranks)
        if not names(run.folder):
            continue
        checkpoint = find_complete(run.folder)
        check_configuration(checkpoint, run.config, [])
        there = read_run_file(checkpoint).config.get("validation")
        now = run.config.validation.model_dump(mode="json")
        if there != now:  # which a run may change, and a comparison may not
            raise UserError(
                f"{run.folder} was measured with validation {there}, the study says {now}; choose "
                "another output, or the validation of before"
            )


def complete(study: Study, runs: list[StudyRun]) -> bool:
    """Train and evaluate all runs that are not done. Returns False if asked to stop before.

    Raises UserError where a run fails.
    """
    configs = Path(study.output) / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs, 1):
        doing = f"{number} of {len(runs)}: {run.variant}, seed {run.seed}"
        if measured(run) is None or not _saved(run):
            print(doing, flush=True)
            file = configs / f"{run.folder.name}.yaml"
            file.write_text(run.config.to_yaml())
            launcher = [sys.executable]
            if study.ranks > 1:
                launcher += ["-m", "torch.distributed.run", "--standalone"]
                launcher += [f"--nproc_per_node={study.ranks}"]
            if not _run([*launcher, "-m", "diffmoe", "train", "--config", str(file)], doing):
                return False
        if study.evaluate and not list(evaluations(run).rglob("results.jsonl")):
            tool = [sys.executable, "-m", "diffmoe", "evaluate", str(run.folder)]
            out = ["--out", str(evaluations(run))]
            if not _run([*tool, *study.evaluate, *out], f"{doing}, evaluation"):
                return False
    return True


def _saved(run: StudyRun) -> bool:
    """Whether its last checkpoint is there: the last loss is measured before that is saved."""
    if not names(run.folder):
        return False
    clock = read_run_file(find_complete(run.folder)).clock
    return clock.samples >= run.config.training.total_samples


def _run(command: list[str], doing: str) -> bool:
    """False if it was asked to stop: what asks us, asks the run, which saves and ends."""
    process: subprocess.Popen | None = None
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        if process is not None:  # a terminal's Ctrl-C has reached it already, this does no harm
            process.send_signal(signal.SIGTERM)

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, stop) for number in heard]
    try:
        process = subprocess.Popen(command)
        if stopped:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
    finally:
        for number, handler in zip(heard, before, strict=True):
            signal.signal(number, handler)
    if stopped or code in (EXIT_STOPPED, EXIT_INTERRUPTED):
        return False
    if code:
        raise UserError(f"{doing} failed with exit code {code}; see above, fix it, and run again")
    return True
