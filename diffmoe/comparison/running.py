"""Trains what a study still lacks, one run after another; stopped at any moment it resumes."""

import subprocess
import sys
from pathlib import Path

from diffmoe.comparison.measured import evaluations, measured
from diffmoe.comparison.study import Study, StudyRun
from diffmoe.errors import UserError

STOPPED = 85  # train.py's exit code after it was asked to stop and has saved


def complete(study: Study, runs: list[StudyRun], home: Path) -> bool:
    """Train and evaluate all runs that are not done. Returns False if asked to stop before.

    home: the folder of train.py. Raises UserError where a run fails.
    """
    configs = Path(study.output) / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs, 1):
        told = f"{number} of {len(runs)}: {run.variant}, seed {run.seed}"
        if measured(run) is None:
            print(told, flush=True)
            file = configs / f"{run.folder.name}.yaml"
            file.write_text(run.config.to_yaml())
            launcher = [sys.executable]
            if study.ranks > 1:
                launcher += ["-m", "torch.distributed.run", "--standalone"]
                launcher += [f"--nproc_per_node={study.ranks}"]
            if not _run([*launcher, str(home / "train.py"), "--config", str(file)], told):
                return False
        if study.evaluate and not list(evaluations(run).rglob("results.jsonl")):
            tool = [sys.executable, str(home / "tools/evaluate.py"), str(run.folder)]
            out = ["--out", str(evaluations(run))]
            if not _run([*tool, *study.evaluate, *out], f"{told}, evaluation"):
                return False
    return True


def _run(command: list[str], told: str) -> bool:
    """False if it was asked to stop. Ctrl-C reaches the run as it reaches us: it saves and ends."""
    process = subprocess.Popen(command)
    stopped = False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            stopped = True
    if stopped or code in (STOPPED, 130):
        return False
    if code:
        raise UserError(f"{told} failed with exit code {code}; see above, mend it, and run again")
    return True
