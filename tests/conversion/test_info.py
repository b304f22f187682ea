"""What any path holds, told in a few lines; and the command's way to more experts."""

import shutil
from pathlib import Path

import pytest
import torch

from diffmoe.config import Config
from diffmoe.conversion.info import info
from diffmoe.errors import UserError
from tests.helpers.models import exported, release_file, release_state
from tests.helpers.tiny import tiny_config
from tests.helpers.tools import forked


def test_a_training_checkpoint_is_told(spread_run: Config):
    told = info(Path(spread_run.output))
    assert told["parameters"].startswith("38,272, of which 25,504")
    assert told["samples seen"] == "24 in 3 steps"
    assert told["saved by"] == "2 ranks, expert_parallel=2, zero_stage=2"
    assert told["weights"] == "weights, ema, ema-0.05, ema-0.1"


def test_an_export_is_told_and_a_changed_file_is_found(tmp_path: Path):
    folder = exported(tmp_path / "out")
    told = info(folder)
    assert told["thresholds"] == "0.5000 to 0.5000, mean 0.5000, of 2 layers with 4 experts"
    assert told["checksums"] == "all 2 files agree with theirs"
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="safetensors is missing, or differs from its checksum"):
        info(folder)


def test_both_entries_of_a_release_file_are_told(tmp_path: Path):
    name = "diffmoe_every_layer"
    lagging, live = release_state(name), release_state(name, "buffers_eval")
    told = info(release_file(tmp_path / "a.pt", name, ema=lagging, model=live))
    assert told["kind"] == "state dict with the names of the DiffMoE release"
    assert told["entries"] == "ema, model"
    assert told["parameters"].startswith("103,912,")
    assert told["thresholds of ema"].startswith("0.0000 to 0.0000")
    assert told["thresholds of model"].startswith("0.4")


def test_what_is_no_model_is_named(tmp_path: Path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "text.pt"):
        with pytest.raises(UserError, match=path.name):
            info(path)


class Evil:
    def __reduce__(self):
        return (shutil.rmtree, ("/nonexistent-diffmoe-test",))


def test_a_pickle_with_code_in_it_is_refused(tmp_path: Path):
    torch.save({"ema": {"x": Evil()}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"which may be code .*rmtree"):
        info(tmp_path / "a.pt")


@pytest.mark.slow
def test_the_command_upcycles_and_tells(tmp_path: Path):
    tool = "tools/convert_checkpoint.py"
    dense = exported(tmp_path / "dense", tiny_config(moe__type="dense"))
    target = str(tmp_path / "moe")
    done = forked(tool, dense, target, "--upcycle", "--experts", "4")
    assert done.returncode == 0, done.stderr
    wanted = "train with training.init=TO moe.experts=4 moe.capacity=1 moe.shared_expert_ratio=4\n"
    assert wanted in done.stderr
    told = forked(tool, "info", target)
    assert told.returncode == 0, told.stderr
    assert "upcycled to 4 experts (shared, capacity 1, noise 0)" in told.stdout
