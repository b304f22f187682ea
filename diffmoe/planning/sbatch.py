"""sbatch's options, and a job's script with all that was chosen written into it."""

import re
import shlex
from collections.abc import Mapping

from diffmoe.errors import UserError

# Options that decide what was checked, or that the script itself relies on.
_OWN = (
    *("account", "partition", "time", "cpus-per-task", "mem", "nodes", "gpus-per-node", "gpus"),
    *("ntasks", "ntasks-per-node", "mem-per-cpu", "mem-per-gpu", "output", "signal", "array"),
    *("dependency", "wrap", "chdir"),
)
_SHORT = {
    **{"A": "account", "C": "constraint", "D": "chdir", "G": "gpus", "J": "job-name"},
    **{"L": "licenses", "N": "nodes", "a": "array", "c": "cpus-per-task", "d": "dependency"},
    **{"n": "ntasks", "o": "output", "p": "partition", "q": "qos", "t": "time"},
    **{"w": "nodelist", "x": "exclude"},
}
_UNITS = {"": 2**20, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def further_options(given: list[str], gpus_per_node: int) -> dict[str, str | None]:
    """Words such as `--qos=long -C ib --exclusive`, by their long names; None is without a value.

    Raises UserError for what is no option, and for what tools/submit.py itself decides.
    """
    options: dict[str, str | None] = {}
    words = [word for text in given for word in shlex.split(text)]
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if short := re.fullmatch(r"-([A-Za-z])(.*)", word):
            name, equals, value = f"--{_SHORT.get(short[1], word)}", short[2], short[2]
        if not re.fullmatch(r"--[a-z][a-z-]+", name):
            raise UserError(f'--sbatch "{word}": write options of sbatch, such as "--qos=long"')
        if not equals and words and not words[0].startswith("-"):
            value = words.pop(0)
        name = name.removeprefix("--")
        if name in _OWN:
            raise UserError(
                f'--sbatch "{word}": tools/submit.py sets --{name} itself, so that what it checks '
                "is what runs; give its own option (--help), or leave it out"
            )
        options[name] = value or None
    gres = options.get("gres") or ""
    kinds = [part.partition("(")[0].split(":") for part in gres.split(",")]
    gpus = sum(int(kind[-1]) if kind[-1].isdigit() else 1 for kind in kinds if kind[0] == "gpu")
    if gpus and gpus != gpus_per_node:
        raise UserError(
            f"--sbatch --gres={gres} asks for {gpus} GPUs a node, and --gpus-per-node is "
            f"{gpus_per_node}; make them agree"
        )
    return options


def node_memory(mem: str | None, template: str) -> float:
    """Bytes of host memory that a job gets of each node: --mem, or what the template asks for.

    Raises UserError for what sbatch does not read; 0 is all that a node has, and so infinite.
    """
    if mem is None:
        mem = re.search(r"^#SBATCH --mem=(\S+)", template, re.MULTILINE)[1]
    size = re.fullmatch(r"(\d+)([KMGT]?)", mem)
    if size is None:
        raise UserError(f"--mem {mem}: write it as sbatch takes it, such as 200G")
    return int(size[1]) * _UNITS[size[2]] or float("inf")


def script(
    template: str,
    resources: Mapping[str, str | None],
    environment: Mapping[str, str],
    arguments: list[str],
) -> str:
    """A template of slurm/ with all that was chosen written into it.

    resources: sbatch options without dashes. environment: all DIFFMOE_ variables of the job;
    others do not reach it. arguments: the recipe, then train.py's. The script takes one argument,
    the job's DIFFMOE_LINK.
    """
    lines, missing = [], dict(resources)
    if (missing.get("gres") or "").startswith("gpu"):  # both together would ask for twice as many
        del missing["gpus-per-node"]
    for line in template.splitlines():
        option = re.match(r"#SBATCH --([a-z-]+)=", line)
        if option and option[1] in missing:
            line = _directive(option[1], missing.pop(option[1]))
        elif option and option[1] == "gpus-per-node":
            continue
        elif line.startswith("source "):
            lines += [_directive(name, value) for name, value in missing.items()]
            lines.append('unset "${!DIFFMOE_@}"')
            lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
            lines.append("export DIFFMOE_LINK=${1:-}")
        elif line.startswith("diffmoe_train "):
            settings = shlex.split(line)[2:-1]  # without the template's recipe and "$@"
            line = shlex.join(["diffmoe_train", arguments[0], *settings, *arguments[1:]])
        lines.append(line)
    return "\n".join(lines) + "\n"


def _directive(name: str, value: str | None) -> str:
    return f"#SBATCH --{name}" + ("" if value is None else f"={shlex.quote(value)}")


def template_settings(template: str) -> list[str]:
    """The settings that a template itself gives train.py."""
    line = next(line for line in template.splitlines() if line.startswith("diffmoe_train "))
    return shlex.split(line)[2:-1]
