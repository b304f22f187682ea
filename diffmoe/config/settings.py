"""Settings by their dotted names: set, explained, and what a wrong one was meant to be."""

import difflib
import math
from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from diffmoe.config.section import Section
from diffmoe.errors import UserError


def set_value(values: dict[str, Any], dotted_key: str, value: Any) -> None:
    *sections, key = dotted_key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{dotted_key}: {section} is a value, not a section")
    values[key] = value


def explained_lines(section: Section, values: dict[str, Any], indent: str) -> Iterator[str]:
    """YAML of the section, what each setting means in a comment behind it."""
    for name, value in values.items():
        field, inner = type(section).model_fields[name], getattr(section, name)
        if isinstance(inner, Section):
            yield f"\n{indent}# {(inner.__doc__ or '').splitlines()[0]}\n{indent}{name}:\n"
            yield from explained_lines(inner, value, indent + "  ")
            continue
        # In a list, as that keeps every value on its line: `[VALUE]`.
        shown = yaml.safe_dump([value], default_flow_style=True, width=math.inf)[1:-2]
        setting = f"{indent}{name}: {shown}"
        choices = ""
        if get_origin(field.annotation) is Literal:
            choices = f"({' | '.join(get_args(field.annotation))}) "
        yield f"{setting:<34}  # {choices}{field.description}\n"


def explained_problem(problem: Any, root: type[Section]) -> str:
    """What pydantic found wrong, with the fix. root: the whole configuration."""
    where = [str(part) for part in problem["loc"]]
    if ".".join(where[:-1]) in setting_names(root) and not where[-1].isdigit():
        where.pop()  # of a setting that takes several types, the one that pydantic tried
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        section: Any = root
        for part in problem["loc"][:-1]:
            kind = section.model_fields[part].annotation
            section = next((one for one in get_args(kind) if one is not NoneType), kind)
        known = f"known: {', '.join(section.model_fields)}"
        near = nearest_setting(key, root)
        meant = f". Did you mean {near}?" if near else ""
        return f"unknown key {key}={problem['input']!r}; {known}{meant}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key}={problem['input']!r}: {problem['msg']}"


# What others call some settings.
_ALIASES = {
    "lr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "hidden_size": "model.width",
    "num_layers": "model.depth",
    "num_heads": "model.heads",
    "num_experts": "moe.experts",
    "output_dir": "output",
    "data_dir": "data.path",
    "data_path": "data.path",
    "epochs": "training.total_samples",
    "max_steps": "training.total_samples",
    "bf16": "training.precision",
}


def setting_names(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All settings, as they are written: section.key."""
    names = []
    for name, field in section.model_fields.items():
        inner = [one for one in (field.annotation, *get_args(field.annotation)) if _is_section(one)]
        names += setting_names(inner[0], f"{prefix}{name}.") if inner else [prefix + name]
    return names


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def nearest_setting(key: str, root: type[Section]) -> str | None:
    """The setting that somebody who writes `key` has most likely in mind."""
    key, names = key.lower().replace("-", "_"), setting_names(root)
    last = key.rpartition(".")[2]
    if last in _ALIASES:
        return _ALIASES[last]
    same = [name for name in names if name.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key, same or names, 1, cutoff=0.0 if same else 0.85)
    if not close:
        lasts = {name.rpartition(".")[2]: name for name in reversed(names)}
        close = [lasts[one] for one in difflib.get_close_matches(last, lasts, 1, cutoff=0.75)]
    return close[0] if close else None
