"""Whole runs of a text model: what holds for classes holds for captions."""

from pathlib import Path

import pytest
import torch

from diffmoe.data.manifest import TextContent
from diffmoe.export.open import open_network
from diffmoe.export.sources import checkpoint_source
from diffmoe.export.writing import write_exported
from diffmoe.seeding import keyed_generator
from tests.helpers.runs import (
    SignalDuringStep,
    assert_identical,
    metrics,
    newest,
    pack,
    run_config,
    tensors,
    train,
)
from tests.helpers.tiny import BYTES, FROZEN, random_text

CONTENT = TextContent(encoder="bytes", length=BYTES["length"])
EVERYTHING = {
    "model__text": BYTES,
    "training__label_dropout": 0.3,
    "training__accumulation": 2,
    "training__activation_checkpointing": True,
    "moe__token_pool": "global",
    "optimizer__eps": 1e-3,  # far above the gradients' rounding, which Adam would blow up
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, and in `whole` a run of two ranks that share the experts."""
    folder = tmp_path_factory.mktemp("text")
    pack(folder / "data", text=CONTENT)
    config = run_config(
        folder, 6, output=str(folder / "whole"), parallel__expert_parallel=2, **EVERYTHING
    )
    assert train(config, 2) == [True] * 2
    return folder


def other_run(folder: Path, name: str, **changes):
    return run_config(folder, 6, output=str(folder / name), **EVERYTHING, **changes)


def whole_run(folder: Path):
    return other_run(folder, "whole", parallel__expert_parallel=2)


@pytest.mark.slow
def test_a_run_of_captions_resumes_bit_for_bit(folder: Path):
    parts = other_run(folder, "parts", parallel__expert_parallel=2, data__workers=1)
    for step in (2, 4):
        assert train(parts, 2, prepare=SignalDuringStep(step)) == [False] * 2
    assert train(parts, 2) == [True] * 2
    assert_identical(tensors(newest(parts)), tensors(newest(whole_run(folder))))


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 2)])
def test_other_layouts_give_the_same_losses_and_weights(folder: Path, world: int, stage: int):
    config = other_run(folder, f"world{world}", parallel__zero_stage=stage)
    assert train(config, world) == [True] * world
    for line, expected in zip(metrics(config), metrics(whole_run(folder)), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert line["gradient_norm"] == pytest.approx(expected["gradient_norm"], abs=1e-5)
    state = tensors(newest(config))
    for name, expected in tensors(newest(whole_run(folder))).items():
        assert (state[name] - expected).abs().max() < 1e-6, name
        if name.startswith(("weights/text_embed", "weights/blocks.0.cross_attention.proj")):
            assert expected.count_nonzero() > 0, name  # it has learned


def test_an_export_of_a_text_model_computes_what_its_checkpoint_does(folder: Path, tmp_path: Path):
    checkpoint = newest(whole_run(folder))
    with checkpoint_source(checkpoint) as source:
        written = write_exported(source, tmp_path / "model")
    assert written.compared == 2 * 2 * 2 * 8 * 8  # two routings of two samples
    there, here = open_network(checkpoint), open_network(tmp_path / "model")
    assert here.config.model == there.config.model
    captions = random_text(here.config.model.text, 3, keyed_generator("export"))
    inputs = torch.randn(3, 2, 8, 8), torch.rand(3), captions
    with torch.no_grad():
        a, b = (one.network(*inputs).prediction for one in (there, here))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FROZEN, "text.encoder=bytes, but model.text.encoder=frozen; set model.text.encoder=bytes"),
        ({**BYTES, "length": 5}, "text.length=6, but model.text.length=5; set model.text.length=6"),
    ],
    ids=["encoder", "length"],
)
def test_a_run_on_other_captions_is_refused(folder: Path, text: dict, message: str):
    config = other_run(folder, "refused").replace({"model.text": text})
    with pytest.raises(AssertionError, match=message):
        train(config)
    assert not Path(config.output).exists()


def test_a_class_model_trains_on_captioned_data_as_on_any(tmp_path: Path):
    """The same steps bit for bit: captions draw from a generator of their own."""
    for name, changes in (("with", {"text": CONTENT}), ("without", {})):
        (tmp_path / name).mkdir()
        pack(tmp_path / name / "data", **changes)
        train(run_config(tmp_path / name, 3))
    states = (tensors(newest(run_config(tmp_path / name, 3))) for name in ("with", "without"))
    assert_identical(*states)
