"""What a benchmark tells: its figures against their targets, and the machine it ran on."""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import yaml

from diffmoe.errors import UserError
from diffmoe.files import read_text


@dataclass(frozen=True)
class Figure:
    """One number. ratio: to what its name says; at_most, at_least: the target of `judged`.

    judged: the ratio where there is one, else the value.
    """

    name: str
    value: float
    unit: str
    ratio: float | None = None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool | None:
        judged = self.value if self.ratio is None else self.ratio
        if self.at_most is not None:
            return judged <= self.at_most
        return None if self.at_least is None else judged >= self.at_least

    def row(self) -> list[str]:
        target = f"<= {self.at_most:.3g}" if self.at_most is not None else ""
        target = f">= {self.at_least:.3g}" if self.at_least is not None else target
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        met = {None: "", True: "met", False: "NOT met"}[self.met]
        return [self.name, f"{self.value:.4g} {self.unit}".strip(), ratio, target, met]


def machine() -> dict[str, Any]:
    """What figures depend on, with the load before the benchmark adds its own."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }


@dataclass
class Report:
    command: str
    settings: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=machine)
    figures: list[Figure] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)  # of --growth
    notes: list[str] = field(default_factory=list)

    def add(self, *figure: Any, **fields: Any) -> None:
        """The fields of a Figure."""
        self.figures.append(Figure(*figure, **fields))

    def note(self, text: str) -> None:
        """What is not in the figures, and why; once."""
        if text not in self.notes:
            self.notes.append(text)

    def expect(self, path: Path) -> None:
        """Replace targets by those of a YAML file: a figure's name, at_least or at_most, a number.

        Raises UserError for a figure that is not there or not the only one of its name, and for
        anything else than a number.
        """
        aims = read_aims(path)
        names = [figure.name for figure in self.figures]
        unknown = sorted(aims.keys() - set(names))
        if unknown:
            raise UserError(
                f"--expect {path}: no figure is called {', '.join(unknown)}; there are "
                + ", ".join(sorted(set(names)))
            )
        for name in aims:
            if names.count(name) > 1:
                raise UserError(f"--expect {path}: {names.count(name)} figures are called {name}")
        for place, figure in enumerate(self.figures):
            if figure.name in aims:
                least, most = (aims[figure.name].get(key) for key in ("at_least", "at_most"))
                self.figures[place] = replace(figure, at_least=least, at_most=most)

    def table(self) -> str:
        rows = [["figure", "value", "ratio", "target", ""], *(one.row() for one in self.figures)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        told = [f"{key}: {value}" for key, value in {**self.machine, **self.settings}.items()]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([f"{self.command} ({', '.join(told)})", *lines, *self.notes])

    def write(self, path: Path) -> None:
        """JSON: command, settings, machine, figures (each with met: true, false or null), notes."""
        figures = [asdict(one) | {"met": one.met} for one in self.figures]
        try:
            path.write_text(json.dumps(asdict(self) | {"figures": figures}, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write --json {path}: {error.strerror}") from None


def read_aims(path: Path) -> dict[str, dict[str, float]]:
    """Targets by the figures' names. Raises UserError naming the file and what is wrong in it."""
    try:
        aims = yaml.safe_load(read_text(path))
    except OSError as error:
        raise UserError(f"cannot read --expect {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"--expect {path} is not valid YAML: {error}") from None
    if not isinstance(aims, dict):
        raise UserError(f"--expect {path} must hold figures' names, it holds {aims!r}")
    for name, aim in aims.items():
        one = list(aim.items()) if isinstance(aim, dict) else []
        if len(one) != 1 or one[0][0] not in ("at_least", "at_most"):
            raise UserError(f"--expect {path}: {name}: write at_least: NUMBER or at_most: NUMBER")
        if not isinstance(one[0][1], int | float):
            raise UserError(f"--expect {path}: {name}: {one[0][1]!r} is not a number")
    return aims


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
