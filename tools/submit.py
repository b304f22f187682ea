"""Check a run on the login node, then queue it.

  python tools/submit.py xl --nodes 4 --account A data.path=/data/imagenet256 --dry-run
  python tools/submit.py l --recipe diffmoe_l_e8_flow --time 24:00:00 --chain 5 data.path=DIR

Refused here, not after the queue: a wrong setting, data or DeepSpeed JSON, a number of GPUs that
does not fit, too little GPU memory or disk space, a checkpoint of another run. Prints the plan,
writes the exact script beside the run (RUN/submitted/) and submits it. --dry-run shows it and
changes nothing. --chain N queues N jobs, each going on where the last one was stopped by its time
limit, for clusters that do not requeue. Needs no GPU.
"""

import argparse
import subprocess
import time
from pathlib import Path

from diffmoe.errors import UserError, run_command
from diffmoe.planning.machine import Machine

HOME = Path(__file__).resolve().parents[1]
RECIPES = {size: f"diffmoe_{size}_e16_flow" for size in ("s", "b", "l", "xl")}
DEFAULT_NODES = {"s": 1, "b": 1, "l": 1, "xl": 4}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=RECIPES, help="which of slurm/train_*.sh")
    parser.add_argument("--recipe", help="or a YAML file; default the template's")
    parser.add_argument("--ds_config", metavar="JSON")
    parser.add_argument("--nodes", type=int, help="default the template's")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default 8")
    parser.add_argument(
        "--gpu-memory", type=float, default=80, metavar="GB", help="of a GPU; default 80"
    )
    for option in ("account", "partition", "time", "cpus-per-task", "mem"):
        parser.add_argument(f"--{option}", help="as sbatch's")
    parser.add_argument(
        "--chain", type=int, default=1, metavar="N", help="jobs after each other; default 1"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="train.py's; default cuda where there is one"
    )
    parser.add_argument("--dry-run", action="store_true", help="change nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def main() -> None:
    options = parse()
    from diffmoe.planning.submission import check, script, template_settings
    from diffmoe.planning.telling import detail
    from diffmoe.recipes import load_config

    template = (HOME / f"slurm/train_{options.size}.sh").read_text()
    recipe = options.recipe or RECIPES[options.size]
    nodes = options.nodes or DEFAULT_NODES[options.size]
    config = load_config(recipe, [*template_settings(template), *options.overrides])
    machine = Machine(memory=options.gpu_memory * 1e9)
    planned = check(config, options.ds_config, nodes, options.gpus_per_node, machine)
    print(f"{recipe} on {nodes} nodes x {options.gpus_per_node} GPUs: {detail(planned)}")
    print(machine.assumptions(), "\n")

    run = Path(config.output).absolute()
    name = time.strftime("%Y%m%d-%H%M%S")
    resources = {
        "nodes": str(nodes),
        "ntasks-per-node": str(options.gpus_per_node),
        "gpus-per-node": str(options.gpus_per_node),
        "output": str(run / "submitted/%x-%j.out"),
    }
    for option in ("account", "partition", "time", "cpus-per-task", "mem"):
        if value := getattr(options, option.replace("-", "_")):
            resources[option] = value
    environment = {"DIFFMOE_HOME": str(HOME), "DIFFMOE_RUN": str(run)}
    if options.chain > 1:
        environment["DIFFMOE_CHAIN"] = name
    arguments = [recipe if options.recipe is None else _absolute(recipe)]
    for flag, value in (("--ds_config", options.ds_config), ("--device", options.device)):
        if value:
            arguments += [flag, _absolute(value) if flag == "--ds_config" else value]
    arguments += [one for one in options.overrides if not one.startswith("output=")]
    text = script(template, resources, environment, arguments)
    if options.dry_run:
        print(text)
        return
    written = run / f"submitted/{name}.sh"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(text)
    jobs: list[str] = []
    for _ in range(options.chain):
        after = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        jobs.append(_sbatch([*after, str(written)]))
    print(f"submitted {written} as {', '.join(f'job {job}' for job in jobs)}; follow it with")
    print(f"  squeue -j {','.join(jobs)}\n  tail -F {run}/submitted/*-{jobs[0]}.out")
    print(f"stop it, saved, with\n  scancel {' '.join(reversed(jobs))}")


def _sbatch(arguments: list[str]) -> str:
    command = ["sbatch", "--parsable", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("there is no sbatch here; run this on a login node") from None
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path


if __name__ == "__main__":
    run_command(main)
