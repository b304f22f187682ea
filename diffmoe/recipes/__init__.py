"""Configurations by name, from the files beside this one, or from a file; then overrides."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from diffmoe.config import Config, set_value, validated
from diffmoe.errors import UserError
from diffmoe.files import cannot_read, read_text

_LIMIT = 64 << 10  # bytes of a file, and values in it; recipes have some two thousand bytes
RECIPES = Path(__file__).parent
# Recipes of one file each; the others are rows of presets.yaml over imagenet.yaml.
_WHOLE = (
    *("mnist", "captioned_digits", "t2i_s_e8", "t2i_l_e16"),
    *("diffmoe_l_e16_repa", "diffmoe_xl_e16_rae"),
)
_OBJECTIVES = ("flow", "ddpm")


def recipe_names() -> list[str]:
    """All named runs, e.g. diffmoe_l_e16_flow."""
    sizes, families = _presets()
    names = list(_WHOLE)
    for objective in _OBJECTIVES:
        for family in families:
            for size, row in sizes.items():
                counts = [""] if family == "dense" else [f"_e{count}" for count in row["experts"]]
                names += [f"{family}_{size}{count}_{objective}" for count in counts]
    return names


@cache
def _presets() -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables of sizes and of families."""
    tables = read_yaml(RECIPES / "presets.yaml")
    return tables["sizes"], tables["families"]


def load_config(name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a recipe by name or a YAML file, then apply overrides such as `model.depth=6`.

    The name of an ImageNet recipe is what it holds, FAMILY_SIZE[_eEXPERTS]_OBJECTIVE, of the tables
    in diffmoe/recipes/presets.yaml.
    Raises UserError naming the key, its value and the way out.

    >>> import diffmoe
    >>> config = diffmoe.load_config("mnist", ["moe.experts=8", "output=runs/eight"])
    >>> config.moe.experts, config.output, config.model.latent_shape  # (C, H, W)
    (8, 'runs/eight', (1, 28, 28))
    """
    if name_or_path.endswith((".yaml", ".yml")):
        values = read_yaml(Path(name_or_path))
        source = name_or_path
    else:
        values = _recipe(name_or_path)
        source = f"recipe {name_or_path}"
    _refuse_code(values, source)
    values.setdefault("output", f"runs/{Path(name_or_path).stem}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"override {override!r} has no '='; write it as section.key=value")
        try:
            set_value(values, key, _parsed(text))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"override {override!r} is not valid YAML: {error}") from None
    return validated(values, source)


def _refuse_code(values: dict[str, Any], source: str) -> None:
    """A file may have come with somebody's model: what runs code is given by hand alone."""
    data, evaluation = (values.get(name) for name in ("data", "evaluation"))
    given = []
    if isinstance(data, dict) and data.get("allow_commands"):
        given.append("data.allow_commands=true")
    for key in ("extractor", "classifier"):
        value = evaluation.get(key) if isinstance(evaluation, dict) else None
        if isinstance(value, str) and ":" in value:
            given.append(f"evaluation.{key}={value}")
    if given:
        raise UserError(
            f"{source}: {given[0]} can run code on this machine, so it is accepted on the "
            f"command line only: remove it from the file and give {given[0]}"
        )


def _recipe(name: str) -> dict[str, Any]:
    if name in _WHOLE:
        return read_yaml(RECIPES / f"{name}.yaml")
    sizes, families = _presets()
    parts = ("|".join(choices) for choices in (families, sizes, _OBJECTIVES))
    match = re.fullmatch(r"({})_({})(?:_e(\d+))?_({})".format(*parts), name)
    if not match or (match[1] == "dense") != (match[3] is None):
        raise UserError(
            f"no recipe {name!r}; give a YAML file's path (ending in .yaml) or one of:\n  "
            + "\n  ".join(recipe_names())
        )
    family, size, experts, objective = match.groups()
    shape = {key: value for key, value in sizes[size].items() if key != "experts"}
    values = _merged(read_yaml(RECIPES / "imagenet.yaml"), {"model": shape})
    values = _merged(values, families[family])
    set_value(values, "diffusion.objective", objective)
    if experts:
        set_value(values, "moe.experts", int(experts))
    return values


class _NumbersLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as people mean it (YAML 1.1 wants 1.0e-4)."""


_NumbersLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file. Raises UserError where it is no such file."""
    try:
        values = _parsed(read_text(path, _LIMIT))
    except OSError as error:
        raise UserError(cannot_read(path, error)) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path} must hold sections such as 'model:', it holds {values!r:.200}")
    return values


def _parsed(text: str) -> Any:
    """The value of a YAML document. Raises YAMLError, ValueError, or RecursionError for deep ones.

    Aliases are counted as what they stand for: ten that each stand for ten others, and so on, would
    fill any memory.
    """
    loader = _NumbersLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _values(root, {}) > _LIMIT:
            raise ValueError(f"its aliases stand for over {_LIMIT} values")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _values(node: yaml.Node, counted: dict[int, int]) -> int:
    """How many values a node stands for, those behind its aliases included."""
    if id(node) not in counted:
        counted[id(node)] = _LIMIT  # until it is known: one that holds itself has no end
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        counted[id(node)] = 1 + sum(_values(part, counted) for part in parts)
    return counted[id(node)]


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _merged(base.get(key, {}), over[key])
        if isinstance(over.get(key), dict)
        else over.get(key, base.get(key))
        for key in base | over
    }
