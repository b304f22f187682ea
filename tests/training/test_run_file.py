"""run.json: every version's file is read, and written again as it was."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from diffmoe.checkpoints.run_file import Origin, read_run_file, stored_config
from diffmoe.clock import Clock
from diffmoe.errors import UserError

OLD = Path(__file__).parent / "old_checkpoint.tar.xz"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "step-00000002"


def change(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    """Change fields by their path, PART__FIELD; returns all."""
    values = json.loads((checkpoint / "run.json").read_text())
    for path, value in changes.items():
        *sections, field = path.split("__")
        section = values
        for name in sections:
            section = section[name]
        section[field] = value
    (checkpoint / "run.json").write_text(json.dumps(values, indent=1))
    return values


def test_an_old_file_is_written_again_byte_for_byte(checkpoint: Path):
    record = read_run_file(checkpoint)
    assert record.json_text() == (checkpoint / "run.json").read_text()
    assert record.clock == Clock(samples=16, step=2, skipped=0)
    assert (record.saved_by.world, record.settings.parallel.expert_parallel) == (2, 2)
    assert stored_config(checkpoint, record.config).training.batch_size == 8


def test_unknown_fields_are_kept(checkpoint: Path):
    """And settings of another version, which only the whole configuration refuses."""
    values = change(
        checkpoint,
        future={"a": None},
        saved_by__future=1,
        config__parallel__future="x",
        origin={"path": "/runs/a", "sha256": "0"},
        reconstructed={"std": 0.1, "error": 0.0, "from": ["step-00000002"]},
    )
    record = read_run_file(checkpoint)
    assert json.loads(record.json_text()) == values
    assert record.origin == Origin(path="/runs/a", sha256="0")
    assert record.settings.parallel.zero_stage == 1
    with pytest.raises(UserError, match="holds a configuration of another version"):
        stored_config(checkpoint, record.config)


def test_averages_are_none_where_the_version_had_none(checkpoint: Path):
    values = json.loads((checkpoint / "run.json").read_text())
    del values["config"]["training"]["ema_stds"]
    (checkpoint / "run.json").write_text(json.dumps(values))
    record = read_run_file(checkpoint)
    assert record.settings.training.ema_stds == ()
    assert json.loads(record.json_text()) == values


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("clock__step", -1, "clock.step=-1"),
        ("clock__samples", 1 << 53, "clock.samples=9007199254740992"),
        ("saved_by__world", 0, "saved_by.world=0"),
        ("config__parallel__expert_parallel", "two", "config.parallel.expert_parallel='two'"),
        ("config__training__batch_size", 0, "config.training.batch_size=0"),
        ("config__parallel", None, "config.parallel=None"),
        ("origin", "somewhere", "origin='somewhere'"),
    ],
)
def test_a_damaged_field_is_named(checkpoint: Path, field: str, value: Any, reason: str):
    change(checkpoint, **{field: value})
    with pytest.raises(UserError) as raised:
        read_run_file(checkpoint)
    assert str(raised.value).startswith(f"{checkpoint}/run.json is damaged ({reason}: ")
    assert "take an older checkpoint" in str(raised.value)
