"""From a folder of photographs to a class by its name: in the shell, and in Python."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.shards import photograph
from tests.helpers.tools import forked, tool

TINY = [
    "model.width=16",
    "model.depth=2",
    "model.heads=2",
    "training.batch_size=4",
    "training.total_samples=8",
    "optimizer.warmup_samples=0",
    "data.workers=0",
    "logging.wandb=false",
]
SCRIPT = """
import sys
import diffmoe

folder, *settings = sys.argv[1:]
config = diffmoe.load_config("mnist", [*settings, "output=from_python"])
assert diffmoe.train(config, device="cpu")
images = diffmoe.Pipeline("from_python", device="cpu")("tabby cat", seed=0, steps=2, guidance=2)
images[0].save("python.png")
"""


@pytest.mark.slow
def test_from_a_folder_of_photographs_to_a_class_by_its_name(tmp_path: Path):
    for number in range(6):
        file = tmp_path / "photos" / ("ship", "tabby cat")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        photograph(number).save(file)
    data, run = tmp_path / "data", tmp_path / "run"
    packed = tool(
        "encode_latents", "--images", tmp_path / "photos", "--pixels", "--size", 8, "--out", data,
        "--shards", 3,
    )  # fmt: skip
    assert packed.returncode == 0, packed.stderr
    following = shlex.split(packed.stdout.splitlines()[-1])
    assert following[:5] == ["next:", "python", "train.py", "--config", "mnist"]
    settings = following[5:]
    assert settings[0] == f"data.path={data}"
    expected = ["in_channels=3", "input_size=8", "num_classes=2"]
    assert settings[1:4] == [f"model.{one}" for one in expected]
    assert settings[4:] == ["data.lanes=2", "output=runs/data"]

    # In the shell: each command is the one that the last one named.
    words = [*following[2:-1], f"output={run}", *TINY, "--device", "cpu"]
    trained = forked(*words)
    assert trained.returncode == 0, trained.stderr
    # DeepSpeed's, of optimizers that it does not know.
    assert "WARNING" not in trained.stdout + trained.stderr
    following = shlex.split(re.findall("next: python (.*)", trained.stderr)[-1])
    assert following[:4] == ["tools/sample.py", str(run), "--classes", "ship,tabby cat"]
    picture = tmp_path / "shell.png"
    following[3] = "tabby cat"
    short = ["--out", picture, "--steps", 2, "--per-class", 1]
    sampled = forked(*following, *short)
    assert sampled.returncode == 0, sampled.stderr
    assert "ema weights" in sampled.stdout

    # In Python: the same run, and the same image.
    (tmp_path / "script.py").write_text(SCRIPT)
    done = forked(
        "script.py", data, *settings[:-1], *TINY, cwd=tmp_path, PYTHONPATH=str(Path.cwd())
    )
    assert done.returncode == 0, done.stderr
    images = [np.asarray(Image.open(tmp_path / name)) for name in ("shell.png", "python.png")]
    assert images[1].shape == (8, 8, 3)
    assert np.array_equal(_inside(images[0]), images[1])


def _inside(picture: np.ndarray) -> np.ndarray:
    """The one image of a contact sheet, without its class's name."""
    assert (picture[:, :-8] < 128).any()
    return picture[:, -8:]
