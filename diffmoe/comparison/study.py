"""A study's file: what is compared, and the run of each variant and seed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffmoe.config import Config
from diffmoe.errors import UserError, describe_problem
from diffmoe.recipes import load_config, read_yaml


class Study(BaseModel):
    """Variants of one configuration, trained on the same samples, noise and times for each seed.

    config: recipe or YAML file. overrides: of all runs. variants: name to further overrides.
    reference: the variant that the others are compared with. output: folder of all runs.
    ranks: processes of each run. evaluate: arguments of tools/evaluate.py for each finished run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str
    overrides: list[str] = []
    variants: dict[str, list[str]] = Field(min_length=2)
    reference: str
    seeds: list[int] = Field(min_length=1)
    output: str
    ranks: int = Field(1, ge=1)
    evaluate: list[str] = []

    @model_validator(mode="after")
    def _names(self) -> "Study":
        if self.reference not in self.variants:
            raise ValueError(
                f"reference={self.reference} is none of the variants {', '.join(self.variants)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} lists one twice")
        wrong = next((name for name in self.variants if Path(name).name != name), None)
        if wrong is not None:
            raise ValueError(f"the variant {wrong!r} cannot name a folder")
        return self


class StudyRun(NamedTuple):
    """One training: a variant at a seed."""

    variant: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


SHIPPED = Path(__file__).parent / "studies"


def read_study(name_or_path: str | Path) -> Study:
    """A study of ours by name, or a YAML file.

    Raises UserError naming the field, its value and the way out.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = SHIPPED / f"{name_or_path}.yaml"
        if not path.exists():
            names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
            raise UserError(f"study {name_or_path}: there is none; choose {names}, or a YAML file")
    try:
        return Study.model_validate(read_yaml(path))
    except ValidationError as error:
        problems = [f"{path}: {describe_problem(one)}" for one in error.errors()]
        raise UserError("\n".join(problems)) from None


def runs_of(study: Study) -> list[StudyRun]:
    """All runs, seed by seed, so that an unfinished study has whole pairs to compare.

    Raises UserError where a variant does not fit, or changes what all must share.
    """
    runs = list(_runs(study))
    first = runs[0].config
    for run in runs:
        if run.config.training.validate_every is None:
            raise UserError(
                "a study compares held-out losses: set training.validate_every and validation.path "
                "among its overrides"
            )
        for key in ("training.batch_size", "training.total_samples", "data", "validation"):
            ours, theirs = (_at(config, key) for config in (run.config, first))
            if ours != theirs:
                raise UserError(
                    f"variant {run.variant}: {key} is {ours} here and {theirs} in "
                    f"{runs[0].variant}; what is compared must see the same samples"
                )
    return runs


def _runs(study: Study) -> Iterator[StudyRun]:
    for seed in study.seeds:
        for variant, overrides in study.variants.items():
            output = Path(study.output) / f"{variant}-{seed}"
            own = [f"seed={seed}", f"output={output}"]
            config = load_config(study.config, [*study.overrides, *overrides, *own])
            yield StudyRun(variant, seed, config)


def _at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
