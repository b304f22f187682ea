import json
import re
from pathlib import Path

import pytest

from diffmoe.config import ModelConfig
from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from tests.helpers.tiny import tiny_config


@pytest.fixture
def folder(tmp_path, pack):
    pack(tmp_path / "data", [5, 4, 3])
    return tmp_path / "data"


def mend(folder, **changes):
    """Rewrite manifest.json; None removes the field."""
    fields = json.loads((folder / "manifest.json").read_text()) | changes
    fields = {name: value for name, value in fields.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(fields))


def model_of(channels: int, size: int, classes: int) -> ModelConfig:
    return ModelConfig(in_channels=channels, input_size=size, num_classes=classes)


def test_a_saved_manifest_loads_equal_and_passes_its_checks(folder):
    manifest = Manifest.load(folder)
    assert [shard.samples for shard in manifest.shards] == [5, 4, 3]
    assert manifest.samples == 12
    manifest.save(folder)
    assert Manifest.load(folder) == manifest
    manifest.check(folder, lanes=3)
    manifest.check_model(model_of(2, 4, 7))
    assert not list(folder.glob("*.tmp"))


def test_missing_folder_names_the_setting(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; set data\.path"):
        Manifest.load(tmp_path / "nowhere")


def test_folder_without_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json is missing.*pack the data again"):
        Manifest.load(tmp_path)


def test_manifest_that_is_not_json_is_named(folder):
    (folder / "manifest.json").write_text('{"version": 1,')
    with pytest.raises(UserError, match=r"manifest\.json is not JSON"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"color": "red"}, r"manifest\.json: color is unknown"),
        ({"classes": None}, r"manifest\.json: classes is missing"),
        ({"version": 3}, r"version=3"),
        ({"content": "moments"}, r"content='moments'"),
        ({"shape": [4, 0, 4]}, r"shape=\[4, 0, 4\].*at least 1"),
        ({"scale": [1.0, 2.0, 3.0]}, r"scale has 3 numbers for 2 channels"),
        ({"scale": 0.0}, r"scale contains a zero"),
        ({"class_names": ["a"]}, r"class_names has 1 names, classes is 7"),
        ({"shards": [{"name": "a.tar"}]}, r"shards\.0\.samples is missing"),
    ],
)
def test_wrong_fields_are_named(folder, changes, message):
    mend(folder, **changes)
    with pytest.raises(UserError, match=message):
        Manifest.load(folder)


def test_missing_shard_is_named(folder):
    (folder / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000001\.tar is missing"):
        Manifest.load(folder).check(folder)


def test_empty_shard_is_named(folder):
    (folder / "000001.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"000001\.tar is empty"):
        Manifest.load(folder).check(folder)


def test_truncated_shard_is_named_with_both_sizes(folder):
    shard = folder / "000002.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-512])
    message = rf"000002\.tar is truncated: {size - 512} bytes on disk, {size} in manifest\.json"
    with pytest.raises(UserError, match=message + r".*pack the data again"):
        Manifest.load(folder).check(folder)


@pytest.mark.parametrize("lanes", [0, 4])
def test_fewer_shards_than_lanes_names_both_and_the_way_out(folder, lanes):
    message = rf"data\.lanes={lanes} does not fit the 3 shards.*set data\.lanes to 1\.\.3, or pack"
    with pytest.raises(UserError, match=message):
        Manifest.load(folder).check(folder, lanes=lanes)


def test_counts_must_be_positive(folder):
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    mend(folder, shards=[shards[0] | {"samples": 0}])
    with pytest.raises(UserError, match=r"000000\.tar has samples=0"):
        Manifest.load(folder).check(folder)
    mend(folder, shards=[])
    with pytest.raises(UserError, match="shards is empty"):
        Manifest.load(folder).check(folder)
    mend(folder, shards=shards, classes=0)
    with pytest.raises(UserError, match="classes=0"):
        Manifest.load(folder).check(folder)


def test_addresses_are_paths_or_urls(folder):
    manifest = Manifest.load(folder)

    def addresses(name="a.tar", location=None):
        shard = manifest.shards[0].model_copy(update={"name": name})
        return manifest.model_copy(update={"location": location}).address("some/data", shard)

    assert addresses() == f"{Path.cwd()}/some/data/a.tar"
    assert addresses("/else/a.tar") == "/else/a.tar"
    assert addresses("file:/else/a.tar") == addresses("file:///else/a.tar") == "/else/a.tar"
    assert addresses("http://host/a.tar") == "http://host/a.tar"
    assert addresses(location="/else") == "/else/a.tar"
    assert addresses(location="file:/else/{}") == "/else/a.tar"
    assert addresses(location="pipe:cat '/el se/{}'") == "pipe:cat '/el se/a.tar'"
    assert addresses("https://host/a", location="/else") == "https://host/a"
    mend(folder, location="pipe:cat /else/x.tar")
    with pytest.raises(UserError, match=r"location='pipe:cat /else/x.tar' needs \{\}"):
        Manifest.load(folder)


def test_as_many_bad_files_as_allowed_pass_the_check(folder):
    manifest = Manifest.load(folder)
    (folder / "000001.tar").unlink()
    (folder / "000002.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"000001\.tar is missing"):
        manifest.check(folder)
    with pytest.raises(UserError, match=r"000002\.tar is empty"):
        manifest.check(folder, max_bad_shards=1)
    manifest.check(folder, max_bad_shards=2)


def test_shards_behind_urls_are_not_looked_for_on_disk(folder):
    for shard in folder.glob("*.tar"):
        shard.unlink()
    mend(folder, location="pipe:cat /else/{}")
    Manifest.load(folder).check(folder, lanes=3)
    mend(folder, location="/else")
    with pytest.raises(UserError, match=r"shard /else/000000\.tar is missing"):
        Manifest.load(folder).check(folder)


def test_all_settings_that_must_change_are_told_at_once(folder):
    fitting = "set model.in_channels=2 model.input_size=4 model.num_classes=7 model.patch_size=2"
    with pytest.raises(UserError, match=f"{fitting} data.lanes=2, or data.path to other data"):
        Manifest.load(folder).check_model(
            ModelConfig(in_channels=3, input_size=9, patch_size=3, num_classes=1000), lanes=4
        )


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"data__lanes": 3}, ["in_channels=2", "input_size=4", "num_classes=7"]),
        ({"data__lanes": 8}, ["in_channels=2", "input_size=4", "num_classes=7", "data.lanes=2"]),
        ({"data__lanes": 3, "model__input_size": 4, "model__num_classes": 7}, ["in_channels=2"]),
    ],
)
def test_a_run_is_told_all_that_must_change_at_once(folder, changes, settings):
    config = tiny_config(model__in_channels=3, training__batch_size=24, **changes)
    with pytest.raises(UserError) as caught:
        Manifest.load(folder).check_model(config.model, config.data.lanes)
    wanted = " ".join(one if "." in one else f"model.{one}" for one in settings)
    assert f"; set {wanted}, or data.path to other data" in str(caught.value)
    told = dict(one.split("=") for one in wanted.split())
    fitting = config.replace({key: int(value) for key, value in told.items()})
    Manifest.load(folder).check_model(fitting.model)
    Manifest.load(folder).check_lanes(fitting.data.lanes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ((4, 4, 7), "shape=2x4x4 has 2 channels, but model.in_channels=4; set model.in_channels=2"),
        ((4, 8, 9), "set model.in_channels=2 model.input_size=4 model.num_classes=7, or data.path"),
        ((2, 8, 7), "model.input_size=8; set model.input_size=4"),
        ((2, 4, 1000), "classes=7, but model.num_classes=1000; set model.num_classes=7"),
    ],
)
def test_a_model_of_another_shape_is_refused_with_both_values(folder, model, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Manifest.load(folder).check_model(model_of(*model))
