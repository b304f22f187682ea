"""What captions add to a step: FLOPs as in flops.py, bytes as in activations.py.

B samples, L tokens per caption, D width of the network, W width of the text features, S image
tokens; `a` bytes per element.
"""

from diffmoe.config import BYTES, TextConfig
from diffmoe.planning.layouts import Layout

F32, INT64 = 4, 8


def _text(layout: Layout) -> TextConfig:
    """Every function here is for text models alone."""
    assert layout.config.model.text is not None
    return layout.config.model.text


def cross_attention_flops(layout: Layout) -> tuple[int, int]:
    """FLOPs of one block's forward: (projections, attention's two products)."""
    model, S = layout.config.model, layout.tokens
    inner, length = model.heads * model.width_of_head, _text(layout).length
    products = 4 * (S + layout.micro_batch * length) * model.width * inner
    return products, 4 * S * length * inner


def cross_attention_recomputed(layout: Layout) -> int:
    """FLOPs that checkpointing recomputes per block: all but the output projection."""
    products, attention = cross_attention_flops(layout)
    model = layout.config.model
    last = 2 * layout.tokens * model.width * model.heads * model.width_of_head
    return products - last + attention


def embedding_flops(layout: Layout) -> tuple[list[tuple[int, bool]], int]:
    """FLOPs of embedding the captions, in the form of flops._forward."""
    text, D = _text(layout), layout.config.model.width
    B, L, W = layout.micro_batch, text.length, text.width
    own = text.encoder == BYTES
    products = [
        (2 * B * L * W * D, own),
        (2 * B * (W if own else text.pooled) * D, own),
        (text.depth * 2 * B * L * W * 12 * W, True),
    ]
    return products, text.depth * 4 * B * L * L * W


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
