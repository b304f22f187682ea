"""Every refusal names the values and the way out, before any work."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe.checkpoints.network import load_network
from diffmoe.checkpoints.run_file import read_run_file
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.training.preflight import check_data
from tests.helpers.processes import TRAIN, command, write_config
from tests.helpers.runs import pack, run_config, train
from tests.helpers.tools import forked


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    return str(error.value)


def refusal_of_run(config: Config, **options: Any) -> str:
    """The UserError of a start on a real rank."""
    with pytest.raises(AssertionError) as error:
        train(config, **options)
    found = str(error.value)
    marker = "diffmoe.errors.UserError: "
    assert marker in found, found
    return found.split(marker)[-1].strip()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Config]:
    """Two checkpoints, at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("trained")
    pack(folder / "data")
    config = run_config(folder, 2, training__checkpoint_samples=8)
    train(config)
    return folder, config


@pytest.fixture
def run(tmp_path: Path, trained) -> Config:
    """A copy of `trained` to be broken, which still has two steps to go."""
    folder, config = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    return config.replace({"output": str(tmp_path / "run"), "training.total_samples": 32})


def test_no_data_path(tmp_path: Path):
    message = refusal(check_data, run_config(tmp_path, 1, data__path=None))
    assert message.startswith("data.path is not set")
    assert "prepare_data.py" in message


def test_data_folder_that_is_not_there(tmp_path: Path):
    message = refusal(check_data, run_config(tmp_path, 1))
    assert message.startswith(f"data folder {tmp_path}/data does not exist; set data.path")


def test_fewer_shards_than_lanes(tmp_path: Path):
    pack(tmp_path / "data", [8, 8, 8])
    message = refusal(check_data, run_config(tmp_path, 1))
    assert message.startswith("data.lanes=4 does not fit the 3 shards of the data; set data.lanes")


def test_truncated_shard(tmp_path: Path):
    shard = pack(tmp_path / "data") / "000002.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-512])
    message = refusal(check_data, run_config(tmp_path, 1))
    assert f"{shard} is truncated: {size - 512} bytes on disk, {size} in manifest.json" in message


@pytest.mark.slow
def test_shard_that_is_damaged_inside(tmp_path: Path):
    """Of the right size, so that only reading finds it: by a worker, told without its traceback."""
    for shard in pack(tmp_path / "data").glob("*.tar"):
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    message = refusal_of_run(run_config(tmp_path, 1, data__workers=1))
    assert "cannot be read (corrupt: sha256" in message
    assert "copy it again or pack the data again" in message


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.in_channels", 4, "has 2 channels, but model.in_channels=4"),
        ("model.input_size", 16, "is 8 high and 8 wide, but model.input_size=16"),
        ("model.num_classes", 10, "classes=5, but model.num_classes=10"),
    ],
)
def test_manifest_against_model(tmp_path: Path, key: str, value: int, said: str):
    pack(tmp_path / "data")
    message = refusal(check_data, run_config(tmp_path, 1).replace({key: value}))
    assert said in message
    assert f"set {key}=" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"clock": {"sam', "Unterminated string"),
        (b"\xff\xfe", "codec"),
        (b"{}", "it lacks clock, config, latents, optimizer_steps"),
        (b"[1]", "it lacks clock"),
        (b"7", "not iterable"),
    ],
)
def test_damaged_run_json(run: Config, content: bytes, said: str):
    checkpoint = Path(run.output) / "step-00000002"
    (checkpoint / "run.json").write_bytes(content)
    message = refusal(read_run_file, checkpoint)
    assert message.startswith(f"{checkpoint}/run.json is damaged (")
    assert said in message
    assert "take an older checkpoint" in message


def test_checkpoint_of_an_unknown_configuration(run: Config):
    file = Path(run.output) / "step-00000002/run.json"
    file.write_text(file.read_text().replace('"qk_norm"', '"of_the_future"'))
    message = refusal(load_network, file.parent)
    assert message.startswith(f"{file} holds a configuration of another version: ")
    assert "model.of_the_future" in message


DAMAGES = {
    "truncated tensors": lambda folder: _cut(folder / "__0_0.distcp"),
    "missing tensors": lambda folder: (folder / "__0_0.distcp").unlink(),
    "truncated index": lambda folder: _cut(folder / "index.json"),
    "missing index": lambda folder: (folder / "index.json").unlink(),
    "garbage": lambda folder: (folder / "index.json").write_bytes(b"garbage"),
}


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors(run: Config, damage: str):
    checkpoint = Path(run.output) / "step-00000002"
    DAMAGES[damage](checkpoint)
    message = refusal(load_network, checkpoint)
    assert message.startswith(f"{checkpoint} is damaged (")
    assert "take an older checkpoint" in message


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_the_command_refuses_cuda_without_a_gpu(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 1)
    done = forked("train.py", "--config", write_config(config), "--device", "cuda")
    assert done.returncode == 2
    assert done.stderr.strip().split("\n")[-1] == (
        "error: --device cuda, but torch sees no GPU; use --device cpu"
    )
    assert "Traceback" not in done.stderr


def test_the_command_tells_an_unknown_key_without_a_traceback():
    done = command(sys.executable, TRAIN, "--config", "mnist", "model.dept=6")
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe mnist: unknown key model.dept=6; known: ")
    assert "Traceback" not in done.stderr
