"""What a manifest names runs no command, unless whoever sits at this machine has said so."""

import json
import os
from pathlib import Path

import pytest
from webdataset import utils
from webdataset.gopen import gopen_schemes

from diffmoe.checkpoints.run_file import stored_config
from diffmoe.config import Config
from diffmoe.data.fetching import Fetch, check_addresses, open_shard
from diffmoe.data.manifest import Manifest, starts_program
from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import open_images
from diffmoe.prepare.checking import check_data
from diffmoe.recipes import load_config
from diffmoe.sampling.passes import real_examples
from diffmoe.training.preflight import check_data as check_before_training
from tests.helpers.runs import pack as pack_run
from tests.helpers.runs import run_config

ALLOWED = Fetch(allow_commands=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Data whose manifest has been given a command that leaves a mark in the current folder."""
    folder = pack_run(tmp_path / "data")
    # Absolute: a reader that is ahead may open its next shard after this folder has been left.
    change(folder, location=f"pipe:touch {tmp_path}/was-run; cat {folder}/{{}}")
    monkeypatch.chdir(tmp_path)
    return folder


def change(folder: Path, **fields) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rename(folder: Path, name: str) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0]["name"] = name
    change(folder, shards=shards)


READERS = {
    "training's start": lambda folder: check_before_training(run_config(folder.parent, 1)),
    "a tool on a run's data": lambda folder: next(
        real_examples(run_config(folder.parent, 1), 4, 4, 0)
    ),
    "check_data": lambda folder: (
        pytest.fail(str(check_data(folder, None)))
        if not check_data(folder, None).problems
        else raise_first(check_data(folder, None).problems)
    ),
    "one shard": lambda folder: open_shard(
        Manifest.load(folder).address(folder, Manifest.load(folder).shards[0]),
        Manifest.load(folder).shards[0],
    ),
}


def raise_first(problems: list[str]) -> None:
    raise UserError(problems[0])


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_what_the_data_names(folder: Path, reader: str):
    with pytest.raises(UserError, match=r"start a program.*data\.allow_commands=true.*--allow"):
        READERS[reader](folder)
    assert not Path("was-run").exists()


def test_images_of_such_a_folder_are_refused(folder: Path):
    with pytest.raises(UserError):
        list(open_images(folder).parts())
    assert not Path("was-run").exists()


def test_with_the_permission_it_runs(folder: Path):
    manifest = Manifest.load(folder)
    check_addresses(folder, manifest, ALLOWED)
    assert check_data(folder, None, fetch=ALLOWED).problems == []
    assert Path("was-run").exists()
    config = run_config(folder.parent, 1, data__allow_commands=True)
    check_before_training(config)
    assert len(next(real_examples(config, 4, 4, 0)).t) == 4


@pytest.mark.parametrize("scheme", [s for s in gopen_schemes if s.isalpha()] + ["s3"])
def test_every_scheme_that_starts_a_program_needs_it(folder: Path, scheme: str):
    """Of those that webdataset knows; http is read by Python itself."""
    address = f"{scheme}://host/a.tar"
    assert starts_program(address) == (scheme not in ("http", "https"))
    shard = Manifest.load(folder).shards[0]
    if starts_program(address):
        with pytest.raises(UserError, match="start a program"):
            open_shard(address, shard)


NAMES = [
    "pipe:touch was-run",
    "gs://bucket/a.tar",
    "a; touch was-run",
    "$(touch was-run)",
    "a`touch was-run`",
    "a\ntouch was-run",
    "a.tar' ; touch was-run '",
    "--checkpoint-action=exec=sh",
    "~/a.tar",
    "a b",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_shards_name_is_no_command_even_with_the_permission(folder: Path, name: str):
    rename(folder, name)
    change(folder, location=f"pipe:cat {folder}/{{}}")
    manifest = Manifest.load(folder)
    with pytest.raises(UserError, match=r"manifest\.json: the shard name .* run as a command"):
        check_addresses(folder, manifest, ALLOWED)
    assert "would run as a command" in check_data(folder, None, fetch=ALLOWED).problems[0]
    if name.partition(":")[0] not in ("pipe", "gs"):  # a name of a file, where no command reads it
        change(folder, location=None)
        address = Manifest.load(folder).address(folder, Manifest.load(folder).shards[0])
        assert address == os.path.abspath(folder / name)
    assert not Path("was-run").exists()


def test_webdatasets_own_switch_forbids_what_is_allowed(folder: Path, monkeypatch):
    monkeypatch.setattr(utils, "enforce_security", True)
    with pytest.raises(UserError, match="WDS_SECURE=1 forbids"):
        check_addresses(folder, Manifest.load(folder), ALLOWED)


def test_a_rewritten_address_needs_the_permission_of_what_it_becomes(folder: Path, monkeypatch):
    change(folder, location="http://host/{}")
    manifest = Manifest.load(folder)
    check_addresses(folder, manifest, Fetch())
    monkeypatch.setenv("GOPEN_REWRITE", f"http://host/=pipe:touch was-run; cat {folder}/")
    with pytest.raises(UserError, match="start a program"):
        check_addresses(folder, manifest, Fetch())
    monkeypatch.setenv("GOPEN_REWRITE", f"http://host/={folder}/")
    shard = manifest.shards[0]
    with open_shard(manifest.address(folder, shard), shard) as file:
        assert len(os.pread(file.fileno(), 1 << 20, 0)) == shard.bytes


def test_the_permission_comes_with_no_file_and_stays_in_none(tmp_path: Path):
    given = load_config("mnist", ["data.allow_commands=true"])
    assert given.data.allow_commands
    assert given.replace({"seed": 1}).data.allow_commands
    assert not given.replace({"data.allow_commands": False}).data.allow_commands
    assert "allow_commands" not in given.to_yaml()
    dumped = given.model_dump(mode="json")
    assert "allow_commands" not in json.dumps(dumped)
    dumped["data"]["allow_commands"] = True  # by whoever made the checkpoint
    assert not stored_config(tmp_path, dumped).data.allow_commands
    file = tmp_path / "config.yaml"
    file.write_text(given.to_yaml())
    assert load_config(str(file)) == Config.model_validate(given.model_dump())
    file.write_text(given.to_yaml().replace("data:\n", "data:\n  allow_commands: true\n"))
    with pytest.raises(UserError, match=r"config\.yaml: data\.allow_commands=true .* command line"):
        load_config(str(file))


@pytest.mark.parametrize("key", ["extractor", "classifier"])
def test_a_function_comes_with_no_file(tmp_path: Path, key: str):
    """`module:function` is code of whoever wrote it."""
    file = tmp_path / "config.yaml"
    file.write_text(f"evaluation:\n  {key}: evil:run\n")
    with pytest.raises(UserError, match=rf"config\.yaml: evaluation\.{key}=evil:run can run code"):
        load_config(str(file))
    given = load_config("mnist", [f"evaluation.{key}=own:function"])
    assert getattr(given.evaluation, key) == "own:function"
