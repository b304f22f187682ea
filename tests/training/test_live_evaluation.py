"""A run that evaluates itself: the same run, and the figures that its checkpoint gives."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffmoe.config import Config
from diffmoe.data.manifest import TextContent
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.evaluation import results
from diffmoe.evaluation.image_sets import open_images
from diffmoe.evaluation.models import sample_model
from diffmoe.evaluation.references import load_reference
from diffmoe.sampling.sampler import Sampler
from diffmoe.text.prompts import create_prompts, encoder_of
from tests.helpers.pictures import NAME, extractor, pictures, write_files
from tests.helpers.runs import assert_identical, metrics, newest, pack, run_config, tensors, train
from tests.helpers.tiny import BYTES

CLASSIFIER = "tests.helpers.pictures:brightest_channel"


def _config(folder: Path, steps: int = 4, **changes: Any) -> Config:
    """Evaluates at 16 and 32 samples; every expert is given work by thresholds that move."""
    values = {
        "model__in_channels": 3,
        "training__evaluate_every": 16,
        "training__checkpoint_samples": 16,
        "evaluation__num_samples": 13,
        "evaluation__batch": 3,
        "evaluation__steps": 3,
        "evaluation__guidance": 1.5,
        "evaluation__reference": str(folder / "real"),
        "evaluation__extractor": NAME,
        "evaluation__classifier": CLASSIFIER,
    }
    if not (folder / "data").exists():
        pack(folder / "data", shape=(3, 8, 8))
    if not (folder / "real").exists():
        write_files(folder / "real", pictures(20))
    return run_config(folder, steps, **{**values, **changes})


def _told(config: Config) -> list[dict[str, Any]]:
    return results.read(Path(config.output))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "stage", "decay", "stds", "weights"),
    [
        ("fp32", 1, 0.8, [], "ema"),
        ("bf16", 2, 0.8, [], "ema"),
        ("fp32", 2, None, [0.1], "ema-0.1"),
        ("fp32", 1, None, [], "live"),
    ],
)
def test_the_run_is_the_same_with_and_without(
    tmp_path: Path, precision, stage, decay, stds, weights
):
    shared = {
        "training__precision": precision,
        "parallel__zero_stage": stage,
        "parallel__expert_parallel": 2,
        "training__ema_stds": stds,
        "training__ema_decay": decay,
    }
    config = _config(tmp_path, output=str(tmp_path / "with"), **shared)
    plain = _config(
        tmp_path, output=str(tmp_path / "without"), training__evaluate_every=None, **shared
    )
    train(config, world=2)
    train(plain, world=2)
    assert_identical(tensors(newest(config)), tensors(newest(plain)))
    for key in ("loss", "gradient_norm", "thresholds"):
        assert [line[key] for line in metrics(config)] == [line[key] for line in metrics(plain)]
    told = [result["images"]["model"]["weights"] for result in _told(config)]
    assert told == [weights] * 4  # two measures, twice


def test_figures_are_those_of_the_checkpoint_of_the_same_moment(tmp_path: Path):
    config = _config(tmp_path, parallel__expert_parallel=2)
    train(config, world=2)
    found = _told(config)
    assert [result["clock"]["samples"] for result in found] == [16, 16, 32, 32]
    settings = SamplingSettings(steps=3, guidance=1.5)
    for step, live in zip((2, 4), found[::2], strict=True):
        sampler = Sampler.open(newest(config).parent / f"step-{step:08d}")
        made = sample_model(sampler, tmp_path / "offline", sampler.request(13), settings)
        images = open_images(made.folder)
        offline = results.measure(
            images, extractor(), load_reference(tmp_path / "real", extractor())
        )
        # An image may differ by a level where the ranks round otherwise.
        assert live["metrics"] == pytest.approx(offline["metrics"], rel=2e-3, abs=1e-3)
        assert live["images"]["guidance"] == 1.5
        # Two ranks that share the experts count one of 14 images twice.
        assert live["capacity_measured"] == pytest.approx(made.about["capacity_measured"], rel=0.05)
    assert found[0]["metrics"] != found[2]["metrics"]
    assert set(found[1]["metrics"]) == {f"accuracy-{CLASSIFIER}"}
    with Image.open(Path(config.output) / "evaluation" / "samples-00000004.png") as picture:
        assert picture.size == (8 * 8, 2 * 8)


def test_drawn_labels_are_those_of_the_same_seed_offline(tmp_path: Path):
    config = _config(tmp_path, 2, evaluation__labels="random", evaluation__seed=5)
    train(config)
    live = _told(config)[0]
    settings = SamplingSettings(steps=3, guidance=1.5, seed=5)
    sampler = Sampler.open(newest(config))
    made = sample_model(sampler, tmp_path / "offline", sampler.request(13, "random"), settings)
    images = open_images(made.folder)
    offline = results.measure(images, extractor(), load_reference(tmp_path / "real", extractor()))
    assert live["metrics"] == pytest.approx(offline["metrics"], rel=2e-3, abs=1e-3)
    assert live["images"]["labels"] == images.about["labels"] == "random"
    balanced = _config(tmp_path, 2, output=str(tmp_path / "balanced"), evaluation__seed=5)
    train(balanced)
    (told, *_) = _told(balanced)
    assert told["images"]["labels"] == "balanced"
    assert told["metrics"] != live["metrics"]


class NotANumber:
    """One rank's share of the second evaluation is not finite."""

    def __call__(self, rank: int) -> None:
        from diffmoe.sampling import sampler

        sample_latents, calls = sampler.sample_latents, []

        def broken(network, config, labels, indices, settings, **options):
            calls.append(None)
            # Of 13 images two ranks make three rounds.
            settings = replace(settings, guidance=1e38 if rank == 1 and len(calls) == 5 else 1.5)
            return sample_latents(network, config, labels, indices, settings, **options)

        sampler.sample_latents = broken


def test_images_that_are_no_numbers_cost_an_evaluation_and_no_run(tmp_path: Path):
    config = _config(tmp_path, parallel__expert_parallel=2)
    assert train(config, world=2, prepare=NotANumber()) == [True, True]
    assert {result["clock"]["samples"] for result in _told(config)} == {16}
    pictures = sorted((Path(config.output) / "evaluation").glob("*.png"))
    assert [picture.name for picture in pictures] == ["samples-00000002.png"]


def _captioned(folder: Path, **changes: Any) -> Config:
    pack(folder / "data", shape=(3, 8, 8), text=TextContent(encoder="bytes", length=6))
    (folder / "prompts.txt").write_text("one\n\ntwo\nthree\n")
    values = {
        "model__text": BYTES,
        "evaluation__classifier": None,
        "evaluation__prompts": str(folder / "prompts.txt"),
    }
    return _config(folder, **{**values, **changes})


@pytest.mark.slow
def test_a_text_model_is_judged_on_its_prompts(tmp_path: Path):
    config = _captioned(tmp_path, parallel__expert_parallel=2)
    train(config, world=2)
    live = _told(config)[-1]
    prompts = create_prompts(config, encoder_of(config), ["one", "two", "three"])
    sampler = replace(Sampler.open(newest(config)), prompts=prompts)
    settings = SamplingSettings(steps=3, guidance=1.5)
    made = sample_model(sampler, tmp_path / "offline", sampler.request(13), settings)
    offline = results.measure(
        open_images(made.folder), extractor(), load_reference(tmp_path / "real", extractor())
    )
    assert live["metrics"] == pytest.approx(offline["metrics"], rel=2e-3, abs=1e-3)
    assert live["images"]["captions"] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation__prompts": None}, "set evaluation.prompts to a text file"),
        ({"evaluation__prompts": "absent.txt"}, "prompts: absent.txt does not exist"),
        ({"evaluation__classifier": CLASSIFIER}, "judges classes, and the model takes captions"),
        ({"evaluation__truth": "truth.json"}, "truth truth.json does not contain 'one'"),
        ({"evaluation__text_encoder": "t5"}, "this model reads bytes"),
    ],
)
def test_what_captions_would_fail_on_is_refused_at_the_start(
    tmp_path: Path, monkeypatch, changes, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "truth.json").write_text("[]")
    with pytest.raises(AssertionError, match=message):
        train(_captioned(tmp_path, **changes))


@pytest.mark.slow
def test_the_number_of_ranks_does_not_change_the_figures(tmp_path: Path):
    one = _config(tmp_path, output=str(tmp_path / "one"), moe__token_pool="global")
    two = _config(
        tmp_path,
        output=str(tmp_path / "two"),
        moe__token_pool="global",
        evaluation__batch=2,
        evaluation__num_samples=12,
    )
    one = one.replace({"evaluation.num_samples": 12})
    train(one)
    train(two, world=2)
    for left, right in zip(_told(one), _told(two), strict=True):
        assert left["metrics"] == pytest.approx(right["metrics"], rel=2e-3, abs=1e-3)


class StopWhileSampling:
    """SIGTERM to one rank in the second round of the first evaluation."""

    def __call__(self, rank: int) -> None:
        images, calls = Sampler.images, []

        def interrupted(*args, **options):
            calls.append(None)
            if rank == 1 and len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return images(*args, **options)

        Sampler.images = interrupted


@pytest.mark.slow
def test_a_stop_gives_the_evaluation_up_saves_and_resumes(tmp_path: Path):
    config = _config(tmp_path, steps=6)
    assert train(config, world=2, prepare=StopWhileSampling()) == [False, False]
    assert newest(config).name == "step-00000003"
    assert not (Path(config.output) / "evaluation").exists()
    assert train(config, world=2) == [True, True]
    plain = _config(tmp_path, 6, output=str(tmp_path / "plain"), training__evaluate_every=None)
    train(plain, world=2)
    assert_identical(tensors(newest(config)), tensors(newest(plain)))
    assert {result["clock"]["samples"] for result in _told(config)} == {32, 48}


def test_figures_that_cannot_be_had_do_not_end_the_run(tmp_path: Path):
    not_a_number = NAME.replace("colors", "not_a_number")
    config = _config(tmp_path, evaluation__extractor=not_a_number)
    assert train(config) == [True]
    folder = Path(config.output) / "evaluation"
    assert sorted(path.name for path in folder.iterdir()) == [
        "samples-00000002.png",
        "samples-00000004.png",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation__reference": "absent.npz"}, "reference absent.npz does not exist"),
        ({"evaluation__extractor": "mobilenet"}, "extractor mobilenet: choose"),
        ({"evaluation__classifier": "letters"}, "classifier letters: choose"),
        ({"evaluation__sampler": "ddim"}, "a flow model takes euler"),
        ({"training__label_dropout": 0}, "guidance 1.5: the model was trained with training.lab"),
        ({"evaluation__reference": "empty"}, "holds no images"),
    ],
)
def test_what_an_evaluation_would_fail_on_is_refused_at_the_start(
    tmp_path: Path, monkeypatch, changes, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    config = _config(tmp_path, **changes)
    with pytest.raises(AssertionError, match=message):  # what a rank raised
        train(config)
    assert not Path(config.output).exists()


def test_nothing_to_judge_by_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="evaluate_every=16 has nothing to judge by"):
        _config(tmp_path, evaluation__reference=None, evaluation__classifier=None)


def test_gray_data_needs_a_classifier(tmp_path: Path):
    pack(tmp_path / "gray", shape=(1, 8, 8))
    config = _config(tmp_path, data__path=str(tmp_path / "gray"), model__in_channels=1)
    with pytest.raises(AssertionError, match="the data is gray"):
        train(config)
