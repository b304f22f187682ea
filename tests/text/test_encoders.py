"""Features are those of transformers' own classes, whatever a caption is encoded beside."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffmoe.data.manifest import TextContent
from diffmoe.errors import UserError
from diffmoe.text.encoders import ByteTokenizer, TransformersEncoder, open_encoder

CAPTIONS = ["a red one", "a blue two left of a green three", "two"]


def test_bytes_are_utf8_padded_and_cut():
    text = ByteTokenizer(6).encode(["añb", "", "abcdefgh"])
    assert text.tokens.tolist() == [
        [97, 195, 177, 98, 0, 0],
        [0] * 6,
        [97, 98, 99, 100, 101, 102],
    ]
    assert text.mask_BL.sum(1).tolist() == [4, 0, 6]
    assert text.tokens.dtype == torch.int64
    assert text.pooled is None


@pytest.mark.parametrize(
    ("kind", "ids"), [("t5", [4, 5, 8, 1]), ("clip", [3, 4, 5, 8, 1])]
)  # a red one <eos>, with <bos> before it for CLIP
def test_features_are_those_of_the_class_itself(folders, kind, ids):
    import transformers

    model = {"t5": transformers.T5EncoderModel, "clip": transformers.CLIPTextModel}[kind]
    found = model.from_pretrained(folders / kind)(input_ids=torch.tensor([ids]))
    text = TransformersEncoder(folders / kind, 10).encode(CAPTIONS)
    assert text.tokens.shape == (3, 10, 16)
    assert text.mask_BL[0].tolist() == [True] * len(ids) + [False] * (10 - len(ids))
    # Other batch sizes and lengths round differently in the last bits.
    torch.testing.assert_close(
        text.tokens[0, : len(ids)], found.last_hidden_state[0], atol=1e-5, rtol=0
    )
    assert not text.tokens[0, len(ids) :].any()
    if kind == "clip":
        torch.testing.assert_close(text.pooled[0], found.pooler_output[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(text.pooled[0], text.tokens[0, len(ids) - 1], atol=1e-5, rtol=0)
    else:
        assert text.pooled is None


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_neither_batch_nor_length_changes_a_caption(folders, kind):
    long = TransformersEncoder(folders / kind, 12)
    together = long.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone = long.encode([caption])
        assert torch.equal(alone.mask_BL[0], together.mask_BL[row])
        torch.testing.assert_close(alone.tokens[0], together.tokens[row], atol=1e-5, rtol=0)
    short = TransformersEncoder(folders / kind, 6).encode(CAPTIONS)
    torch.testing.assert_close(short.tokens[0], together.tokens[0, :6], atol=1e-5, rtol=0)
    assert short.mask_BL.sum(1).tolist() == [min(6, n) for n in together.mask_BL.sum(1).tolist()]


def test_the_folder_may_move_but_not_change(folders, tmp_path):
    content = TransformersEncoder(folders / "t5", 8).content
    assert (content.length, content.width, content.pooled) == (8, 16, 0)
    moved = tmp_path / "of another name"
    shutil.copytree(folders / "t5", moved)
    assert open_encoder(content, moved).content == content

    weights = load_file(moved / "model.safetensors")
    weights["encoder.final_layer_norm.weight"][3] += 1e-3
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=rf"has encoder=t5-\w+, .*trained with encoder={content.encoder}, "
    ):
        open_encoder(content, moved)


def test_another_vocabulary_is_another_encoder(folders, tmp_path):
    before = TransformersEncoder(folders / "t5", 8).content
    shutil.copytree(folders / "t5", tmp_path / "t5")
    file = tmp_path / "t5" / "tokenizer.json"
    file.write_text(file.read_text().replace('"red"', '"crimson"'))
    assert TransformersEncoder(tmp_path / "t5", 8).content.encoder != before.encoder


def test_what_cannot_be_meant_is_refused(folders, tmp_path):
    clip = TransformersEncoder(folders / "clip", 12).content
    assert clip.pooled == 16
    for content, path, message in [
        (clip, folders / "t5", r"t5-\w+.*trained with encoder=clip-\w+"),
        (clip, None, f"need the text encoder {clip.encoder}"),
        (TextContent(encoder="bytes", length=9), folders / "t5", "this model reads bytes"),
        (clip.model_copy(update={"length": 13}), folders / "clip", "13 tokens .* takes 12"),
        (clip.model_copy(update={"pooled": 8}), folders / "clip", "pooled=16.*pooled=8"),
        (clip, tmp_path, "nothing is downloaded"),
    ]:
        with pytest.raises(UserError, match=message):
            open_encoder(content, path)
    assert open_encoder(TextContent(encoder="bytes", length=9), None).content.length == 9


def test_a_folder_that_lacks_weights_is_refused(folders, tmp_path):
    """transformers itself would draw them at random."""
    shutil.copytree(folders / "t5", tmp_path / "t5")
    weights = load_file(tmp_path / "t5" / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, tmp_path / "t5" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"no weights for encoder\.final_layer_norm\.weight"):
        TransformersEncoder(tmp_path / "t5")
    config = tmp_path / "t5" / "config.json"
    config.write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="model_type=bert; give the folder of a T5 or CLIP"):
        TransformersEncoder(tmp_path / "t5")
    np.testing.assert_equal(TransformersEncoder(folders / "t5").content.length, 128)
