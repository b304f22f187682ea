"""What a benchmark tells: its figures against their targets, and the machine it ran on."""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch

from diffmoe.errors import UserError


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

    def add(self, *figure: Any, **fields: Any) -> None:
        """The fields of a Figure."""
        self.figures.append(Figure(*figure, **fields))

    def table(self) -> str:
        rows = [["figure", "value", "ratio", "target", ""], *(one.row() for one in self.figures)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        told = [f"{key}: {value}" for key, value in {**self.machine, **self.settings}.items()]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([f"{self.command} ({', '.join(told)})", *lines])

    def write(self, path: Path) -> None:
        """JSON: command, settings, machine, figures (each with met: true, false or null)."""
        figures = [asdict(one) | {"met": one.met} for one in self.figures]
        try:
            path.write_text(json.dumps(asdict(self) | {"figures": figures}, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write --json {path}: {error.strerror}") from None


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
