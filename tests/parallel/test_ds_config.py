"""The DeepSpeed JSON beside the configuration: agree, adopt, or be told."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.parallel.zero import engine_settings, read_ds_config, reconcile
from diffmoe.recipes import load_config

SHIPPED = sorted((Path(__file__).parents[2] / "deepspeed_configs").glob("*.json"))

# (our key, our value, the JSON that agrees, the JSON that differs, the value it wants)
OVERLAPS: list[tuple[str, Any, dict, dict, Any]] = [
    ("training.batch_size", 64, {"train_batch_size": 64}, {"train_batch_size": 128}, 128),
    (
        "training.accumulation",
        2,
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 4},
        4,
    ),
    (
        "optimizer.gradient_clipping",
        1.0,
        {"gradient_clipping": 1},
        {"gradient_clipping": 0.5},
        0.5,
    ),
    (
        "parallel.zero_stage",
        1,
        {"zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 2}},
        2,
    ),
    (
        "training.precision",
        "fp32",
        {"bf16": {"enabled": False}},
        {"bf16": {"enabled": True}},
        "bf16",
    ),
]


def ours(key: str, config: Config) -> Any:
    section, field = key.split(".")
    return getattr(getattr(config, section), field)


def with_value(key: str, value: Any) -> Config:
    section, field = key.split(".")
    return Config.model_validate({section: {field: value}})


@pytest.mark.parametrize(
    ("key", "value", "agrees", "differs", "wanted"), OVERLAPS, ids=lambda v: str(v)
)
class TestEachOverlap:
    def test_agreement_changes_nothing(self, key, value, agrees, differs, wanted):
        config = with_value(key, value)
        assert reconcile(config, agrees) == config

    def test_a_value_only_in_the_json_is_adopted(self, key, value, agrees, differs, wanted):
        config = reconcile(Config(), differs)
        assert ours(key, config) == wanted
        assert reconcile(config, differs) == config

    def test_a_contradiction_names_both_values(self, key, value, agrees, differs, wanted):
        with pytest.raises(UserError) as caught:
            reconcile(with_value(key, value), differs, "mine.json")
        message = str(caught.value)
        (ds_key, told), *_ = differs.items()
        if isinstance(told, dict):
            ((inner, told),) = told.items()
            ds_key = f"{ds_key}.{inner}"
        told = str(told).lower()
        assert f"{ds_key}={told} in mine.json, but {key}={value}" in message
        assert "make them agree, or leave the value out of the JSON" in message


def test_all_contradictions_are_told_in_one_message():
    config = Config.model_validate(
        {
            "training": {"batch_size": 64, "accumulation": 1, "precision": "bf16"},
            "optimizer": {"gradient_clipping": 1.0},
            "parallel": {"zero_stage": 2},
        }
    )
    settings = {
        "train_batch_size": 128,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": False},
    }
    with pytest.raises(UserError) as caught:
        reconcile(config, settings)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 5
    assert "  train_batch_size=128 in ds_config, but training.batch_size=64" in lines
    assert "  bf16.enabled=false in ds_config, but training.precision=bf16" in lines


def test_an_empty_json_changes_nothing():
    config = Config.model_validate({"training": {"batch_size": 64}})
    assert reconcile(config, {}) == config


def test_an_adopted_value_is_checked_as_if_it_were_ours():
    with pytest.raises(UserError, match=r"zero_stage=3.*use stage 1 or 2"):
        reconcile(Config(), {"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match=r"training.batch_size=100 is not divisible by data.lanes"):
        reconcile(Config(), {"train_batch_size": 100})


# Reading the file ----------------------------------------------------------------------------


def written(folder: Path, settings: Any) -> str:
    path = folder / "ds.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return str(path)


def test_a_file_is_read_as_it_is(tmp_path: Path):
    settings = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}
    assert read_ds_config(written(tmp_path, settings)) == settings


def test_a_missing_file_is_told_its_path(tmp_path: Path):
    path = str(tmp_path / "none.json")
    with pytest.raises(UserError) as caught:
        read_ds_config(path)
    assert f"--ds_config: {path} does not exist" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ('{"train_batch_size": 8', "is not valid JSON: "),
        ("[1, 2]", "must hold an object, it holds [1, 2]"),
        (
            {"optimizer": {"type": "Adam"}},
            "'optimizer' belongs to the run's configuration; remove it here and set optimizer.*",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            "'scheduler' belongs to the run's configuration; remove it here and set optimizer.*",
        ),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true is not supported; use bf16"),
    ],
    ids=["broken", "list", "optimizer", "scheduler", "fp16"],
)
def test_a_wrong_file_is_told_what_is_wrong_with_it(tmp_path: Path, settings: Any, told: str):
    path = written(tmp_path, settings)
    with pytest.raises(UserError) as caught:
        read_ds_config(path)
    assert told in str(caught.value)
    assert path in str(caught.value)


def test_fp16_switched_off_is_accepted(tmp_path: Path):
    assert read_ds_config(written(tmp_path, {"fp16": {"enabled": False}}))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_is_complete_and_goes_with_the_defaults(path: Path):
    assert '"auto"' not in path.read_text()
    settings = read_ds_config(str(path))
    config = reconcile(Config(), settings)
    assert config.parallel.zero_stage == settings["zero_optimization"]["stage"]
    assert (config.training.precision == "bf16") == settings["bf16"]["enabled"]


# What the engine gets ------------------------------------------------------------------------


def test_the_engine_gets_the_json_and_the_configuration():
    config = Config.model_validate(
        {
            "training": {"batch_size": 64, "accumulation": 2, "precision": "bf16"},
            "optimizer": {"gradient_clipping": 0.5},
            "parallel": {"zero_stage": 2},
        }
    )
    given = {"wall_clock_breakdown": True, "zero_optimization": {"overlap_comm": False}}
    settings = engine_settings(config, given, world=4)
    assert settings["train_batch_size"] == 64
    assert settings["train_micro_batch_size_per_gpu"] == 8
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"]["enabled"] is True
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["zero_optimization"]["overlap_comm"] is False
    assert settings["wall_clock_breakdown"] is True


def test_a_micro_batch_in_the_json_that_does_not_follow_is_refused():
    config = Config.model_validate({"training": {"batch_size": 64, "accumulation": 2}})
    assert engine_settings(config, {"train_micro_batch_size_per_gpu": 8}, world=4)
    with pytest.raises(UserError) as caught:
        engine_settings(config, {"train_micro_batch_size_per_gpu": 16}, world=4)
    assert (
        "train_micro_batch_size_per_gpu=16 in the DeepSpeed JSON, but training.batch_size=64 over "
        "4 ranks times training.accumulation=2 is 8" in str(caught.value)
    )


@pytest.mark.parametrize(
    ("given", "accumulated", "reduced"),
    [
        ({}, "fp32", "fp32"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "bf16", "bf16"),
        ({"communication_data_type": "bf16"}, "fp32", "bf16"),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "fp32"},
            "bf16",
            "fp32",
        ),
    ],
)
def test_gradients_are_fp32_unless_the_json_says_otherwise(given, accumulated, reduced):
    for stage in (1, 2):
        config = Config().replace({"training.precision": "bf16", "parallel.zero_stage": stage})
        settings = engine_settings(config, given, world=1)
        assert settings["data_types"] == {"grad_accum_dtype": accumulated}
        assert settings["communication_data_type"] == reduced


def test_gradients_of_an_fp32_run_do_not_accumulate_in_bf16():
    given = {"data_types": {"grad_accum_dtype": "bf16"}}
    with pytest.raises(UserError, match=r"grad_accum_dtype=bf16.*training.precision=fp32; leave"):
        engine_settings(Config(), given, world=1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"data_types": {"grad_accum_dtype": "fp16"}}, "data_types.grad_accum_dtype='fp16'"),
        ({"communication_data_type": ["fp32"]}, r"communication_data_type=\['fp32'\]"),
    ],
)
def test_other_types_of_gradients_are_refused(given: dict, told: str):
    config = Config.model_validate({"training": {"precision": "bf16"}})
    with pytest.raises(UserError, match=told + " in the DeepSpeed JSON: choose fp32 or bf16"):
        engine_settings(config, given, world=1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"bf16": {"enabled": "auto"}}', "bf16.enabled='auto' must be a plain value"),
        ('{"train_batch_size": "auto"}', "train_batch_size='auto' must be a plain value"),
        ('{"fp16": true}', "'fp16' must be an object"),
        ('{"zero_optimization": true}', "'zero_optimization' must be an object"),
        ('{"bfloat16": {"enabled": true}}', "write 'bf16' instead of 'bfloat16'"),
        ('{"zero_optimization": {"compute_grad_norm": false}}', "compute_grad_norm=false would"),
        ('{"bf16": {"check_grad_overflow": false}}', "check_grad_overflow=false would"),
        ("\udcff", "is not valid JSON"),
    ],
)
def test_a_json_that_would_be_misread_is_refused(text: str, told: str, tmp_path: Path):
    path = tmp_path / "ds.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        reconcile(load_config("mnist"), read_ds_config(str(path)), str(path))
    assert told in str(caught.value)
    assert str(path) in str(caught.value)
