"""Bytes of activations that captions add, as in activations.py.

D width of the network, W width of the text features, S image tokens; `a` bytes per element.
"""

from diffmoe.config import BYTES, TextConfig
from diffmoe.planning.layouts import Layout

F32, INT64 = 4, 8


def _text(layout: Layout) -> TextConfig:
    """Every function here is for text models alone."""
    assert layout.config.model.text is not None
    return layout.config.model.text


def cross_attention_bytes(layout: Layout) -> int:
    """Bytes that one block's cross-attention saves (or recomputes)."""
    model = layout.config.model
    S, D, a = layout.tokens, model.width, layout.element
    tokens = layout.micro_batch * _text(layout).length
    inner = model.heads * model.width_of_head
    # Normalized tokens; query, key and value; their mix.
    elements = S * D + 2 * (S + tokens) * inner
    statistics = 2 * S * F32 + S * model.heads * F32
    if model.qk_norm:
        elements += (S + tokens) * inner
        statistics += (S + tokens) * model.heads * F32
    return elements * a + statistics


def embedding_bytes(layout: Layout) -> int:
    """Bytes that embedding the captions saves, its output included."""
    text, D, a = _text(layout), layout.config.model.width, layout.element
    M, W = layout.micro_batch * text.length, text.width
    # Features, normalized; projected, with the null caption in place.
    kept = 2 * M * W * a + M * D * a
    # Per block: its input, norms, query, key, value, their mix, and two hidden tensors of the MLP.
    kept += text.depth * (2 * 4 + 8) * M * W * a
    return kept + (M * INT64 if text.encoder == BYTES else 0)
