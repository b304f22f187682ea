"""Options of sbatch, and the job script with all choices written into it."""

import re
import shlex
from collections.abc import Mapping

from diffmoe.errors import UserError

# Options that tools/submit.py sets: the checks or the script depend on them.
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


def extra_options(given: list[str], gpus_per_node: int) -> dict[str, str | None]:
    """Parse options such as `--qos=long -C ib --exclusive`: values by long name, None without one.

    Raises UserError for anything that is not an option, for options that tools/submit.py sets
    itself, and for a --gres with another number of GPUs.
    """
    options: dict[str, str | None] = {}
    words = [word for text in given for word in shlex.split(text)]
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if short := re.fullmatch(r"-([A-Za-z])(.*)", word):
            name, equals, value = f"--{_SHORT.get(short[1], word)}", short[2], short[2]
        if not re.fullmatch(r"--[a-z][a-z-]+", name):
            raise UserError(f'--sbatch "{word}": not an option of sbatch, such as "--qos=long"')
        if not equals and words and not words[0].startswith("-"):
            value = words.pop(0)
        name = name.removeprefix("--")
        if name in _OWN:
            raise UserError(
                f'--sbatch "{word}": tools/submit.py sets --{name} itself, so that what it checks '
                "is what runs; use its own option (see --help), or leave it out"
            )
        options[name] = value or None
    gres = options.get("gres") or ""
    kinds = [part.partition("(")[0].split(":") for part in gres.split(",")]
    gpus = sum(int(kind[-1]) if kind[-1].isdigit() else 1 for kind in kinds if kind[0] == "gpu")
    if gpus and gpus != gpus_per_node:
        raise UserError(
            f"--sbatch --gres={gres} asks for {gpus} GPUs per node, and --gpus-per-node is "
            f"{gpus_per_node}; make them agree"
        )
    return options


def node_memory(mem: str | None, template: str) -> float:
    """Bytes of host memory that a job gets on each node: --mem, or what the template requests.

    0 requests all memory of the node, and gives infinity. Raises UserError for a malformed value.
    """
    if mem is None:
        requested = re.search(r"^#SBATCH --mem=(\S+)", template, re.MULTILINE)
        mem = requested[1] if requested else "0"
    size = re.fullmatch(r"(\d+)([KMGT]?)", mem)
    if size is None:
        raise UserError(f"--mem {mem}: write it as for sbatch, such as 200G")
    return int(size[1]) * _UNITS[size[2]] or float("inf")


def job_script(
    template: str,
    resources: Mapping[str, str | None],
    environment: Mapping[str, str],
    arguments: list[str],
) -> str:
    """A template of slurm/ with all choices written into it.

    resources: sbatch options without dashes. environment: the job's DIFFMOE_ variables; it gets no
    others. arguments: the recipe, then those of train.py. The script itself takes one argument,
    the job's DIFFMOE_LINK.
    """
    lines: list[str] = []
    missing = dict(resources)
    if (missing.get("gres") or "").startswith("gpu"):  # both would request twice as many
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
    """The settings that a template passes to train.py."""
    line = next(line for line in template.splitlines() if line.startswith("diffmoe_train "))
    return shlex.split(line)[2:-1]
