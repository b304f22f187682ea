"""Captions in the stream of samples: which one is drawn, how it is padded, what it leaves alone."""

import shlex

import numpy as np
import pytest
import torch

from diffmoe.config import BYTES, ModelConfig, TextConfig
from diffmoe.data.captions import Captions
from diffmoe.data.manifest import TextContent
from diffmoe.data.reading import read_shard
from diffmoe.data.stream import Batch
from diffmoe.errors import UserError
from diffmoe.recipes import load_config
from diffmoe.seeding import keyed_generator
from diffmoe.tree import tree_cat
from tests.helpers import streams
from tests.helpers.streams import LANES, SEED, N, equal

COUNTS = [7, 5, 6, 8]
LENGTH, WIDTH, POOLED = 9, 3, 2
CONTENTS = {
    BYTES: TextContent(encoder=BYTES, length=LENGTH),
    "frozen": TextContent(encoder="frozen", length=LENGTH, width=WIDTH, pooled=POOLED),
}


def lines_of(index: int) -> list[str]:
    """One to three captions, some longer than there are places."""
    return [f"{k} of {index} är" for k in range(index % 3 + 1)]


def captions_of(index: int, encoder: str) -> Captions:
    """Every number tells its sample, caption and place."""
    lines = lines_of(index)
    if encoder == BYTES:
        return Captions(lines)
    lengths = np.array([(index + k) % LENGTH + 1 for k in range(len(lines))], np.int32)
    names = [100 * index + 10 * k + np.arange(length) for k, length in enumerate(lengths)]
    tokens = np.repeat(np.concatenate(names)[:, None], WIDTH, axis=1).astype(np.float16)
    pooled = np.array([[index, k] for k in range(len(lines))], np.float16)
    return Captions(lines, tokens, lengths, pooled)


@pytest.fixture(scope="module", params=list(CONTENTS))
def stored(request, tmp_path_factory, pack):
    folder = tmp_path_factory.mktemp("captioned")
    content = CONTENTS[request.param]
    return folder, pack(
        folder, COUNTS, lambda index: captions_of(index, request.param), text=content
    )


def batches(stored, steps: int = 12, **changes) -> list[Batch]:
    return streams.batches(*stored, steps, **{"captions": True, **changes})


def test_each_sample_comes_with_one_of_its_captions_and_all_come_up(stored):
    drawn: dict[int, set[int]] = {}
    for batch in batches(stored, steps=60):
        assert batch.text.mask_BL.shape == (LANES * N, LENGTH)
        for row, latent in enumerate(batch.latents):
            index = int(latent[0, 0, 0])
            tokens = batch.text.tokens[row]
            length = int(batch.text.mask_BL[row].sum())
            assert batch.text.mask_BL[row, :length].all()
            assert not tokens[length:].any()
            if batch.text.tokens.dtype == torch.int64:
                told = [line.encode()[:LENGTH] for line in lines_of(index)]
                k = told.index(bytes(tokens[:length].tolist()))
            else:
                k = int(batch.text.pooled[row, 1])
                assert batch.text.pooled[row, 0] == index
                assert length == (index + k) % LENGTH + 1
                expected = 100 * index + 10 * k + torch.arange(length)
                assert torch.equal(tokens[:length], expected[:, None].expand(-1, WIDTH).half())
            drawn.setdefault(index, set()).add(k)
    assert {index: len(captions) for index, captions in drawn.items()} == {
        index: len(lines_of(index)) for index in range(sum(COUNTS))
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_change_no_caption(stored, workers):
    halves = [batches(stored, my_lanes=lanes, workers=workers) for lanes in ([0, 1], [2, 3])]
    assert equal([tree_cat(step) for step in zip(*halves, strict=True)], batches(stored))


def test_a_resumed_stream_draws_the_same_captions(stored):
    assert equal(batches(stored, steps=7, clock=5 * LANES * N), batches(stored)[5:])


def test_captions_move_no_other_draw(stored):
    without = batches(stored, captions=False)
    assert all(batch.text is None for batch in without)
    assert equal([batch._replace(text=None) for batch in batches(stored)], without)


def test_captions_move_no_other_draw_of_posteriors_either(tmp_path, pack):
    """Each latent is some sample's mean and deviation with the noise that its place always had."""
    content = CONTENTS[BYTES]
    manifest = pack(
        tmp_path, COUNTS, lambda index: captions_of(index, BYTES),
        text=content, content="mean_logvar",
    )  # fmt: skip
    moments = torch.stack(
        [torch.tensor(sample.array) for n in range(4)
         for sample in read_shard(tmp_path / f"{n:06d}.tar", manifest)]
    )  # fmt: skip
    mean, log_variance = moments.chunk(2, dim=1)
    (batch,) = batches((tmp_path, manifest), steps=1)
    for lane, latents in enumerate(batch.latents.split(N)):
        noise = torch.randn(N, 2, 4, 4, generator=keyed_generator(SEED, "latent", 0, lane))
        for latent, eps in zip(latents, noise, strict=True):
            off = (mean + (log_variance / 2).exp() * eps - latent).abs().amax((1, 2, 3))
            assert off.min() < 1e-5


@pytest.mark.parametrize("encoder", CONTENTS)
def test_the_override_that_a_manifest_tells_fits_it(encoder: str):
    content = CONTENTS[encoder]
    overrides = shlex.split(content.override())
    if encoder == BYTES:  # the model's encoder has a shape of its own
        overrides += ["model.text.width=8", "model.text.depth=1"]
    assert TextContent.of(load_config("mnist", overrides).model.text) == content


def test_a_model_of_other_features_is_refused_with_both_values(stored):
    _, manifest = stored
    shape = {"in_channels": 2, "input_size": 4}
    bytes_ = {"encoder": BYTES, "width": 8, "depth": 1}
    frozen = {"encoder": "frozen", "pooled": POOLED}
    fitting = {BYTES: bytes_, "frozen": frozen | {"width": WIDTH}}[manifest.text.encoder]
    other = {BYTES: frozen | {"width": WIDTH}, "frozen": bytes_}[manifest.text.encoder]
    cases = [
        (other | {"length": LENGTH}, f"text.encoder={manifest.text.encoder}, but model.text."),
        (fitting | {"length": 10}, "text.length=9, but model.text.length=10; set model.text."),
    ]
    if manifest.text.encoder == "frozen":
        cases += [
            (fitting | {"length": LENGTH, "width": 5}, "text.width=3, but model.text.width=5"),
            (fitting | {"length": LENGTH, "pooled": 0}, "text.pooled=2, but model.text.pooled=0"),
        ]
    # Classes play no part: the data has 7, the model's default is 1000.
    manifest.check_model(ModelConfig(**shape, text=TextConfig(**fitting, length=LENGTH)))
    for text, message in cases:
        with pytest.raises(UserError, match=message):
            manifest.check_model(ModelConfig(**shape, text=TextConfig(**text)))
    bare = manifest.model_copy(update={"text": None})
    with pytest.raises(UserError, match=r"there is no text, but model\.text is set"):
        bare.check_model(ModelConfig(**shape, text=TextConfig(**fitting)))
