"""What a network refuses to be called with, by name; much of it broadcasts without a word."""

import pytest
import torch

from diffmoe.conditions import Text
from diffmoe.models.dit import DiT
from tests.helpers.tiny import BYTES, FROZEN, WITHOUT_POOLED, random_text, randomize, tiny_config


def network(**changes) -> DiT:
    config = tiny_config(**changes)
    return randomize(DiT(config.model, config.moe)).eval()


X, T, LABELS = torch.zeros(3, 2, 8, 8), torch.full((3,), 0.5), torch.tensor([0, 2, 5])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"x": torch.zeros(3, 2, 4, 16)}, r"latents x: \(3, 2, 4, 16\) .* takes \(B, 2, 8, 8\)"),
        ({"x": torch.zeros(3, 2, 9, 9)}, r"latents x: \(3, 2, 9, 9\)"),  # the patches cut it off
        ({"x": torch.zeros(3, 4, 8, 8)}, r"latents x: \(3, 4, 8, 8\)"),
        ({"x": torch.zeros(2, 8, 8)}, r"latents x: \(2, 8, 8\)"),
        ({"x": torch.zeros(3, 2, 8, 8, dtype=torch.uint8)}, r"latents x: .* of uint8"),
        ({"t": torch.tensor(0.5)}, r"times t: \(\) of float32, but 3 latents .* \(3,\)"),
        ({"t": torch.zeros(1)}, r"times t: \(1,\)"),
        ({"t": torch.zeros(3, 1)}, r"times t: \(3, 1\)"),
        ({"t": torch.zeros(2)}, r"times t: \(2,\)"),
        ({"t": torch.ones(3, dtype=torch.bool)}, r"times t: \(3,\) of bool"),
        ({"condition": torch.tensor(1)}, r"labels: \(\) of int64, but 3 latents .* \(3,\)"),
        ({"condition": torch.tensor([1])}, r"labels: \(1,\)"),
        ({"condition": LABELS[:, None]}, r"labels: \(3, 1\)"),
        ({"condition": LABELS.float()}, r"labels: \(3,\) of float32"),
        ({"condition": LABELS.bool()}, r"labels: \(3,\) of bool"),
        ({"condition": LABELS.to(torch.uint8)}, r"labels: \(3,\) of uint8"),
        ({"condition": Text(LABELS, LABELS)}, "captions given to a class-conditioned network"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_other_latents_times_and_labels_are_refused(changed: dict, told: str):
    with pytest.raises(ValueError, match=told):
        network()(**{"x": X, "t": T, "condition": LABELS} | changed)


def test_latents_of_as_many_tokens_but_another_shape_are_refused():
    odd = network(model__input_size=10)
    with pytest.raises(ValueError, match=r"latents x: \(3, 2, 2, 50\).* takes \(B, 2, 10, 10\)"):
        odd(torch.zeros(3, 2, 2, 50), T, LABELS)


def captions(text: dict, samples: int = 3) -> Text:
    config = tiny_config(model__text=text)
    return random_text(config.model.text, samples, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("text", "changed", "told"),
    [
        (FROZEN, {"tokens": torch.zeros(3, 6, 9)}, r"tokens: \(3, 6, 9\) .* features \(3, L, 8\)"),
        (FROZEN, {"tokens": torch.zeros(1, 6, 8)}, r"tokens: \(1, 6, 8\)"),
        (FROZEN, {"tokens": torch.zeros(3, 5, 8)}, r"tokens: \(3, 5, 8\) of float32 .* of L=6"),
        (FROZEN, {"tokens": torch.zeros(3, 6, 8).long()}, r"tokens: \(3, 6, 8\) of int64"),
        (FROZEN, {"mask_BL": torch.ones(3, 6).long()}, r"mask_BL: \(3, 6\) of int64"),
        (FROZEN, {"mask_BL": torch.ones(1, 6).bool()}, r"mask_BL: \(1, 6\)"),
        (FROZEN, {"pooled": None}, r"pooled: missing, not \(3, 4\)"),
        (FROZEN, {"pooled": torch.zeros(1, 4)}, r"pooled: \(1, 4\)"),
        (FROZEN, {"pooled": torch.zeros(3, 5)}, r"pooled: \(3, 5\)"),
        (WITHOUT_POOLED, {"pooled": torch.zeros(3, 4)}, "model.text.pooled=0 takes none"),
        (BYTES, {"tokens": torch.zeros(3, 6, 8)}, r"tokens: \(3, 6, 8\) .* byte ids \(3, L\)"),
        (BYTES, {"tokens": torch.zeros(3, 6)}, r"tokens: \(3, 6\) of float32"),
        (
            BYTES,
            {"tokens": torch.zeros(3, 7).long(), "mask_BL": torch.ones(3, 7).bool()},
            "L up to model.text.length=6",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_other_captions_are_refused(text: dict, changed: dict, told: str):
    with pytest.raises(ValueError, match=told):
        network(model__text=text)(X, T, captions(text)._replace(**changed))


def test_labels_given_to_a_network_of_captions_are_refused():
    with pytest.raises(ValueError, match="labels given to a text-conditioned network"):
        network(model__text=BYTES)(X, T, LABELS)


@pytest.mark.parametrize("text", [None, BYTES, FROZEN, WITHOUT_POOLED])
def test_what_fits_is_taken_in_any_of_its_types(text: dict | None):
    model = network(model__text=text)
    condition = LABELS if text is None else captions(text)
    expected = model(X, T, condition).prediction
    assert torch.equal(model(X.double(), T.double(), condition).prediction, expected)
    if text is None:
        assert torch.equal(model(X, T, LABELS.int()).prediction, expected)
    assert model(X, torch.tensor([0, 10, 999]), condition).prediction.isfinite().all()
