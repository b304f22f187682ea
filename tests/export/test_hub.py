"""Publishing and fetching with the hub's own client, against a hub of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import diffmoe
from tests.helpers.hub import Hub, hub
from tests.helpers.models import exported, flip_bytes
from tests.helpers.processes import environment
from tests.helpers.tools import forked


@pytest.fixture(scope="module")
def server():
    with hub() as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("hub") / "model")


def publish(server: Hub, *arguments: object, **more: str) -> subprocess.CompletedProcess:
    where = {"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_test", **more}
    return forked("tools/publish.py", *arguments, **where)


FETCH = """
import sys
import numpy as np
import diffmoe
pipeline = diffmoe.Pipeline.from_pretrained(sys.argv[2], device="cpu")
np.save(sys.argv[1], np.asarray(pipeline(labels=[0, 1], seed=3, steps=2)[1]))
"""


def fetched(server: Hub, folder: Path, name: str = "somebody/digits", **more: str) -> np.ndarray:
    """An image of the published model, made by a process that has the hub alone."""
    file = folder / "image.npy"
    subprocess.run(
        [sys.executable, "-c", FETCH, file, name],
        env=environment(HF_ENDPOINT=server.address, HF_HOME=str(folder / "cache"), **more),
        check=True,
    )
    return np.load(file)


def test_what_is_published_is_fetched_and_draws_the_same(server: Hub, model: Path, tmp_path: Path):
    done = publish(server, model, "somebody/digits", "--license", "mit", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{server.address}/somebody/digits/commit/")
    files = server.files["somebody/digits"]
    assert files.keys() == {file.name for file in model.iterdir()}
    assert server.private["somebody/digits"]
    for name, content in files.items():
        assert name == "README.md" or content == (model / name).read_bytes()
    card = files["README.md"].decode()
    assert "\nlicense: mit\n" in card
    assert "\nLicense: mit.\n" in card
    assert 'diffmoe.Pipeline.from_pretrained("somebody/digits")' in card
    expected = np.asarray(diffmoe.Pipeline(model, device="cpu")(labels=[0, 1], seed=3, steps=2)[1])
    assert np.array_equal(fetched(server, tmp_path), expected)
    before = len(server.asked)
    assert np.array_equal(fetched(server, tmp_path, HF_HUB_OFFLINE="1"), expected)
    assert len(server.asked) == before


def test_a_dry_run_shows_card_and_files_and_asks_nobody(server: Hub, model: Path):
    before = len(server.asked)
    done = publish(server, model, "somebody/else", "--license", "cc-by-4.0", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "license: cc-by-4.0" in done.stdout
    size = (model / "model.safetensors").stat().st_size / 1e6
    assert f"{size:12.3f} MB  model.safetensors" in done.stdout
    assert len(server.asked) == before


def test_what_cannot_be_published_is_told_before_anything_is_sent(
    server: Hub, model: Path, tmp_path: Path
):
    before = len(server.asked)
    done = publish(server, model, "somebody/new")
    assert done.returncode == 2
    assert "README.md names no license; give one (--license apache-2.0)" in done.stderr
    done = publish(server, tmp_path, "somebody/new", "--license", "mit")
    assert "is not an exported model; make one: python tools/convert_checkpoint.py" in done.stderr
    (apart := tmp_path / "adapters").mkdir()
    (apart / "config.json").write_text(json.dumps({"format": "diffmoe adapters"}))
    done = publish(server, apart, "somebody/new", "--license", "mit")
    assert done.returncode == 2
    told = "holds adapters, and the hub gets whole models: merge them, python tools/convert_check"
    assert told in done.stderr
    broken = exported(tmp_path / "broken")
    flip_bytes(broken / "model.safetensors")
    done = publish(server, broken, "somebody/new", "--license", "mit")
    assert "model.safetensors is missing, or differs from its checksum" in done.stderr
    assert len(server.asked) == before


def test_a_refusal_of_the_hub_is_told_in_a_line(server: Hub, model: Path):
    done = publish(server, model, "somebody/new", "--license", "mit", HF_TOKEN="hf_other")
    assert done.returncode == 2
    assert "somebody/new: the hub gave an error" in done.stderr
    assert "check the name, the network, and the token" in done.stderr
    assert "somebody/new" not in server.files


def test_a_model_that_the_hub_does_not_have(server: Hub, tmp_path: Path):
    script = "import diffmoe; diffmoe.Pipeline.from_pretrained('nobody/nothing', device='cpu')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(HF_ENDPOINT=server.address, HF_HOME=str(tmp_path)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "UserError: the model nobody/nothing: the hub gave an error" in done.stderr


def test_a_path_is_taken_before_the_hub(model: Path):
    here = os.path.relpath(model)
    assert diffmoe.Pipeline.from_pretrained(here, device="cpu").network is not None


PUSH = """
import sys
import diffmoe
pipeline = diffmoe.Pipeline(sys.argv[1], device="cpu")
print(pipeline.push_to_hub("somebody/pushed", license="mit", diffusers=True))
"""
WITH_DIFFUSERS = """
import sys
sys.modules["diffmoe"] = None
import numpy as np
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(
    "somebody/pushed", custom_pipeline="somebody/pushed", trust_remote_code=True
)
images = pipeline(class_labels=[0, 1], seed=3, num_inference_steps=2).images
np.save(sys.argv[1], np.asarray(images[1]))
"""


@pytest.mark.slow
def test_what_a_pipeline_pushes_is_opened_by_diffusers_and_by_us(
    server: Hub, model: Path, tmp_path: Path
):
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra vae)")
    where = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PUSH, model],
        env=environment(HF_TOKEN="hf_test", **where),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith(f"{server.address}/somebody/pushed/commit/"), done.stderr
    card = server.files["somebody/pushed"]["README.md"].decode()
    assert "PATH OF THIS FOLDER" not in card
    assert 'custom_pipeline="somebody/pushed"' in card
    done = subprocess.run(
        [sys.executable, "-c", WITH_DIFFUSERS, tmp_path / "theirs.npy"],
        env=environment(**where), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = np.asarray(diffmoe.Pipeline(model, device="cpu")(labels=[0, 1], seed=3, steps=2)[1])
    theirs = np.load(tmp_path / "theirs.npy").astype(int)
    assert np.abs(theirs - expected).max() <= 1
    assert np.array_equal(fetched(server, tmp_path, name="somebody/pushed"), expected)
