"""The commands over a trained run: calibrate, sample, report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmoe.data.manifest import TextContent
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.sampling.many_images import read_manifest, shard_arrays
from diffmoe.sampling.sampler import Sampler
from tests.helpers.models import exported
from tests.helpers.runs import pack, run_config, train
from tests.helpers.tiny import BYTES, tiny_config
from tests.helpers.tools import command, told

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two ranks that share the experts."""
    folder = tmp_path_factory.mktemp("commands")
    pack(folder / "data", shape=(3, 8, 8))
    config = run_config(folder, 4, model__in_channels=3, parallel__expert_parallel=2)
    train(config, world=2)
    return Path(config.output)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory) -> Path:
    """A run that reads captions."""
    folder = tmp_path_factory.mktemp("text")
    content = TextContent(encoder="bytes", length=BYTES["length"])
    pack(folder / "data", shape=(3, 8, 8), text=content)
    config = run_config(folder, 2, model__in_channels=3, model__text=BYTES)
    train(config)
    return Path(config.output)


def test_the_dial_from_calibration_to_samples_and_report(run, tmp_path):
    sampling = ["--steps", "4", "--guidance", "1.5", "--batch", "8"]
    refused = command("tools/sample.py", run, *sampling, "--capacity", "0.5")
    assert refused.returncode == 2
    assert "tools/calibrate.py" in refused.stderr

    steps = ["--steps", "4", "--samples", "16"]
    output = told("tools/calibrate.py", run, "--capacity", "0.5", "2", *steps)
    assert "stored as 0.5" in output
    checkpoint = run / (run / "latest").read_text()
    entries = json.loads((checkpoint / "thresholds.json").read_text())
    assert entries["0.5"]["measured"] == pytest.approx(0.5, rel=0.01)
    assert told("tools/checkpoint.py", "verify", run).strip().endswith("intact")

    for capacity in ("0.5", "2"):
        picture = tmp_path / f"{capacity}.png"
        output = told(
            *("tools/sample.py", run, *sampling, "--capacity", capacity),
            *("--classes", "0,1,2,3", "--per-class", "4", "--out", picture),
        )
        measured = float(output.split("\ncapacity ")[1].split(":")[0])
        assert measured == pytest.approx(float(capacity), rel=0.05)
        assert Image.open(picture).size == (32, 32)

    folder = ["tools/sample.py", run, *sampling, "--capacity", "0.5", "--num", "4"]
    told(*folder, "--out", tmp_path / "folder")
    told("tools/calibrate.py", run, "--capacity", "0.5", "--common", *steps)
    refused = command(*folder, "--out", tmp_path / "folder")
    assert refused.returncode == 2
    assert "thresholds_sha256" in refused.stderr  # calibrated again: other images

    page = tmp_path / "routing.html"
    told("tools/report_routing.py", run, "--samples", "8", "--steps", "3", "--out", page)
    assert "The capacity predictor" in page.read_text()


def test_latents_for_a_decoder_elsewhere_are_those_of_the_images(tmp_path):
    config = tiny_config(model__in_channels=4)
    latents = {"shape": (4, 8, 8), "scale": 0.5, "shift": 0.25, "autoencoder": "some/vae"}
    model = exported(tmp_path / "model", config, latents=latents)
    out = tmp_path / "latents"
    words = ["tools/sample.py", model, "--steps", "2", "--guidance", "1", "--seed", "3"]
    told(*words, "--num-samples", "6", "--format", "latents", "--out", out)
    manifest = json.loads((out / "samples.json").read_text())
    assert (manifest["content"], manifest["autoencoder"]) == ("latents", "some/vae")
    found = np.load(out / "samples-000000.npz")
    sampler = Sampler.open(model, with_autoencoder=False)
    settings = SamplingSettings(steps=2, guidance=1.0, seed=3)
    expected = sampler.latents(found["labels"].tolist(), settings) / 0.5 + 0.25
    assert np.abs(found["latents"] - expected.numpy()).max() < 1e-5
    with pytest.raises(UserError, match="holds latents of some/vae, not images; decode them"):
        list(shard_arrays(out))
    refused = command(*words, "--format", "latents")
    assert "--format latents fills a folder: give --num-samples N" in refused.stderr


def test_ranks_that_share_experts_fill_a_folder(run, tmp_path):
    words = ["tools/sample.py", run, "--num-samples", "10", "--shard-size", "4", "--steps", "3"]
    output = told(*words, "--out", tmp_path / "two", "--expert-parallel", "2", ranks=2)
    assert output.count("10 samples at 32 training samples, ema weights: ") == 1
    told(*words, "--out", tmp_path / "one", "--format", "adm")
    adm = np.load(tmp_path / "one" / "samples_10x8x8x3.npz")["arr_0"]
    shards = [np.load(tmp_path / "two" / f"samples-00000{part}.npz") for part in range(3)]
    images = np.concatenate([shard["images"] for shard in shards])
    assert np.abs(images.astype(int) - adm).max() <= 1
    manifest = json.loads((tmp_path / "two" / "samples.json").read_text())
    assert manifest["model"]["checkpoint"] == (run / "latest").read_text()
    assert manifest["model"]["routing"] == "per_token"

    # A checkpoint that a bit has flipped in gives no folder of samples.
    damaged = tmp_path / "damaged"
    shutil.copytree(run / (run / "latest").read_text(), damaged)
    file = damaged / "__0_0.distcp"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    refused = command("tools/sample.py", damaged, "--num", "4", "--out", tmp_path / "three")
    assert refused.returncode == 2
    assert "__0_0.distcp" in refused.stderr

    refused = command(*words, "--out", tmp_path / "one", "--guidance", "3")
    assert refused.returncode == 2
    assert "guidance: 1.5 there, 3.0 now" in refused.stderr


def test_all_that_samples_takes_bf16_and_says_so(run, tmp_path):
    model = tmp_path / "model"  # with thresholds of its own
    shutil.copytree(run / (run / "latest").read_text(), model)
    bf16, quick = ["--dtype", "bf16"], ["--steps", "3", "--samples", "8"]
    over = ["--over", "noise", "--data", run.parent / "data"]
    told("tools/calibrate.py", model, "--capacity", "2", *bf16, *quick, *over)
    told("tools/calibrate.py", model, "--capacity", "1", *quick)
    entries = json.loads((model / "thresholds.json").read_text())
    assert (entries["1"]["dtype"], entries["2"]["dtype"]) == ("fp32", "bf16")

    page = tmp_path / "routing.html"
    told("tools/report_routing.py", model, *bf16, *quick, "--out", page)
    assert "in bf16<" in page.read_text()

    words = ["tools/sample.py", model, "--num-samples", "6", "--shard-size", "3", "--steps", "3"]
    told(*words, *bf16, "--out", tmp_path / "two", "--expert-parallel", "2", ranks=2)
    told(*words, *bf16, "--out", tmp_path / "one")
    told(*words, "--out", tmp_path / "fp32")
    images = {
        name: np.concatenate([images for images, _ in shard_arrays(tmp_path / name)]).astype(int)
        for name in ("two", "one", "fp32")
    }
    assert np.abs(images["two"] - images["one"]).mean() < 1
    assert 0 < np.abs(images["fp32"] - images["one"]).mean() < 1
    assert read_manifest(tmp_path / "two")["dtype"] == "bf16"
    assert read_manifest(tmp_path / "fp32")["dtype"] == "fp32"
    refused = command(*words, "--out", tmp_path / "one")
    assert refused.returncode == 2
    assert "dtype: bf16 there, fp32 now" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--guidance-interval", "0.5"], "guidance interval 0.5: two rising times"),
        (["--guidance-interval", "a,b"], "--guidance-interval a,b: write numbers"),
        (["--sampler", "rk4"], "sampler rk4: a flow model takes euler"),
        (["--classes", "0,x"], "--classes 0,x: write numbers"),
        (["--num", "4", "--classes", "99"], "class 99 is outside 0..4"),
        (["--num", "4", "--expert-parallel", "2"], "--expert-parallel 2 does not divide the 1"),
        (["--batch", "-3"], "argument --batch: -3 is below 1"),
        (["--device", "foo"], "--device foo: write cpu, cuda or cuda:0"),
        (["--routing", "static", "--capacity", "nan"], "capacity nan: choose one above 0"),
    ],
)
def test_wrong_words_are_refused_before_any_work(run, tmp_path, words, message):
    done = command("tools/sample.py", run, *words, "--out", tmp_path / "out.png")
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out.png").exists()


def test_prompts_from_the_line_and_a_file_are_drawn_calibrated_and_reported(text_run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("no 1\n\n no 2 \n")
    asked, quick = ["--prompt", "7", "--prompts", file], ["--steps", "2"]
    picture = tmp_path / "grid.png"
    negative = ["--negative-prompt", "9"]
    output = told(
        "tools/sample.py",
        text_run,
        *asked,
        *quick,
        *negative,
        "--per-prompt",
        "2",
        "--out",
        picture,
    )
    assert output.startswith("6 samples")
    width, height = Image.open(picture).size
    assert height == 24  # a row for each of three captions
    assert width > 16  # which stand beside them
    out = tmp_path / "out"
    told("tools/sample.py", text_run, *asked, *quick, *negative, "--num", "4", "--out", out)
    listed = json.loads((out / "samples.json").read_text())
    assert listed["captions"] == ["7", "no 1", "no 2"]
    assert listed["negative_prompt"] == "9"
    assert np.load(out / "samples-000000.npz")["labels"].tolist() == [0, 1, 2, 0]
    calibrated = [*asked, "--capacity", "0.5", "--samples", "6", *quick]
    assert "stored as 0.5" in told("tools/calibrate.py", text_run, *calibrated)
    page = tmp_path / "routing.html"
    told("tools/report_routing.py", text_run, *asked, *quick, "--samples", "6", "--out", page)
    assert "Captions, those that take most compute first" in page.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "draws captions, not classes: give at least one prompt"),
        (["--prompt", "7", "--classes", "1"], "--classes and --check-digits are for models that"),
        (["--prompt", "7", "--text-encoder", "t5"], "t5: this model reads bytes"),
        (["--prompts", "nowhere.txt"], "prompts: nowhere.txt does not exist"),
        (["--prompt", "\udcff"], "is not UTF-8"),
    ],
    ids=["no prompt", "classes", "encoder", "no file", "bytes"],
)
def test_words_for_other_models_are_refused_by_a_text_model(text_run, words, message):
    done = command("tools/sample.py", text_run, *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_a_prompt_for_a_class_model_is_refused(run):
    done = command("tools/sample.py", run, "--prompt", "7")
    assert done.returncode == 2
    assert "draws classes (model.num_classes=5) and takes no prompts; give classes" in done.stderr
