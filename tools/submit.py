"""Check a training run on the login node, then submit it to Slurm.

  python tools/submit.py xl --nodes 4 --account A data.path=/data/imagenet256 --dry-run
  python tools/submit.py l --recipe diffmoe_l_e8_flow --time 24:00:00 --chain 5 data.path=DIR
  python tools/submit.py b --sbatch "--qos=long -C ib" --sbatch "--exclude=n7" data.path=DIR

Refuses before queueing what would fail afterwards: everything that train.py refuses at its start
(settings, data, DeepSpeed JSON, what evaluation needs, a checkpoint of another run), a number of
GPUs that does not fit, too little memory on GPUs or nodes, too little disk space. Prints the plan,
writes the job script to RUN/submitted/ and submits it. The script contains every choice made here,
including the DIFFMOE_* variables of slurm/common.sh, so the job does not depend on this shell's
environment.

--dry-run prints the script and changes nothing. --sbatch passes further options to sbatch; requeued
jobs and all jobs of a chain keep them. --chain N submits N jobs, each of which resumes where the
previous one was stopped by its time limit, for clusters that do not requeue; the last one fails if
the run is not finished. Needs no GPU.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from diffmoe.errors import UserError, run_command
from diffmoe.planning.machine import Machine

HOME = Path(__file__).resolve().parents[1]
RECIPES = {size: f"diffmoe_{size}_e16_flow" for size in ("s", "b", "l", "xl")}
DEFAULT_NODES = {"s": 1, "b": 1, "l": 1, "xl": 4}
# Settings whose value is a file or folder.
PATHS = (
    *("data.path", "data.cache", "training.init"),
    *(f"evaluation.{key}" for key in ("reference", "prompts", "text_encoder", "truth")),
)
# DIFFMOE_ variables that describe the machine. The others describe the run, and are set here.
MACHINE = ("VENV", "CONTAINER", "INTERFACE", "MASTER", "PORT")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=RECIPES, help="which template, slurm/train_*.sh")
    parser.add_argument("--recipe", help="recipe name or YAML file; default the template's")
    parser.add_argument("--ds_config", metavar="JSON", help="DeepSpeed JSON")
    parser.add_argument("--nodes", type=int, help="default the template's")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default 8")
    parser.add_argument(
        "--gpu-memory", type=float, default=80, metavar="GB", help="per GPU; default 80"
    )
    for option in ("account", "partition", "time", "cpus-per-task"):
        parser.add_argument(f"--{option}", help="as for sbatch")
    parser.add_argument("--mem", help="per node, as for sbatch; default the template's")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTIONS",
        help='more options for sbatch, such as "--qos=long --exclude=n7"; may be repeated',
    )
    parser.add_argument(
        "--chain", type=int, default=1, metavar="N", help="jobs in a row; default 1"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="as for train.py; default cuda if available"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the script and change nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(_joined(sys.argv[1:]))


def _joined(words: list[str]) -> list[str]:
    """`--sbatch OPTIONS` as `--sbatch=OPTIONS`; argparse would take OPTIONS for our own options."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--sbatch":
            joined[-1] = f"--sbatch={word}"
        else:
            joined.append(word)
    return joined


def main() -> None:
    options = parse()
    from diffmoe.planning.report import plan_details
    from diffmoe.planning.sbatch import extra_options, job_script, node_memory, template_settings
    from diffmoe.planning.submission import check_submission
    from diffmoe.recipes import load_config

    template_file = HOME / f"slurm/train_{options.size}.sh"
    if not template_file.is_file():
        raise UserError("jobs run the slurm/ and train.py of a clone: call its tools/submit.py")
    template = template_file.read_text()
    recipe = options.recipe or RECIPES[options.size]
    nodes = options.nodes or DEFAULT_NODES[options.size]
    run_options = extra_options(options.sbatch, options.gpus_per_node)
    config = load_config(recipe, [*template_settings(template), *options.overrides])
    memory = node_memory(options.mem, template)
    machine = Machine(memory=options.gpu_memory * 1e9, node_memory=memory)
    planned = check_submission(config, options.ds_config, nodes, options.gpus_per_node, machine)
    print(
        f"{recipe} on {nodes} nodes x {options.gpus_per_node} GPUs: {plan_details(planned, memory)}"
    )
    print(machine.assumptions(), "\n")

    run = Path(config.output).absolute()
    name = time.strftime("%Y%m%d-%H%M%S")
    resources = {
        "nodes": str(nodes),
        "ntasks-per-node": str(options.gpus_per_node),
        "gpus-per-node": str(options.gpus_per_node),
        "output": str(run).replace("%", "%%") + "/submitted/%x-%j.out",
    }
    for option in ("account", "partition", "time", "cpus-per-task", "mem"):
        if value := getattr(options, option.replace("-", "_")):
            resources[option] = value
    names = (f"DIFFMOE_{name}" for name in MACHINE)
    environment = {name: os.environ[name] for name in names if os.environ.get(name)}
    if "DIFFMOE_CONTAINER" not in environment:  # a container has its own Python
        environment.setdefault("DIFFMOE_VENV", sys.prefix)
    environment |= {"DIFFMOE_HOME": str(HOME), "DIFFMOE_RUN": str(run)}
    if options.chain > 1:
        environment["DIFFMOE_CHAIN"] = name
    arguments = [recipe if options.recipe is None else _absolute(recipe)]
    for flag, value in (("--ds_config", options.ds_config), ("--device", options.device)):
        if value:
            arguments += [flag, _absolute(value) if flag == "--ds_config" else value]
    arguments += [_located(one) for one in options.overrides if not one.startswith("output=")]
    text = job_script(template, resources | run_options, environment, arguments)
    if options.dry_run:
        print(text)
        return
    written = run / f"submitted/{name}.sh"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(text)
    jobs: list[str] = []
    for link in range(1, options.chain + 1):
        after = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        jobs.append(_sbatch([*after, str(written), f"{link}/{options.chain}"]))
    print(f"submitted {written} as {', '.join(f'job {job}' for job in jobs)}; follow it with")
    print(f"  squeue -j {','.join(jobs)}\n  tail -F {run}/submitted/*-{jobs[0]}.out")
    print(f"stop it after a save with\n  scancel {' '.join(reversed(jobs))}")


def _sbatch(arguments: list[str]) -> str:
    command = ["sbatch", "--parsable", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("sbatch was not found; run this on a login node") from None
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path


def _located(override: str) -> str:
    """A setting with its path made absolute, because the job runs in the repository's folder."""
    key, _, value = override.partition("=")
    return f"{key}={_absolute(value)}" if key in PATHS else override


if __name__ == "__main__":
    run_command(main)
