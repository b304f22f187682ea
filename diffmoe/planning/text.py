"""What captions add to a step, as flops.py and activations.py count it.

B samples, L places of a caption, D width of the network, W width of the text's features; S image
tokens; `a` bytes an element.
"""

from diffmoe.config import BYTES
from diffmoe.planning.layouts import Layout

F32, INT64 = 4, 8


def cross_attention_flops(layout: Layout) -> tuple[int, int]:
    """(products, attention's two) of one block's forward."""
    model, S = layout.config.model, layout.tokens
    inner, length = model.heads * model.width_of_head, model.text.length
    products = 4 * (S + layout.micro_batch * length) * model.width * inner
    return products, 4 * S * length * inner


def cross_attention_again(layout: Layout) -> int:
    """What checkpointing computes again: torch stops before the output's product."""
    products, attention = cross_attention_flops(layout)
    model = layout.config.model
    last = 2 * layout.tokens * model.width * model.heads * model.width_of_head
    return products - last + attention


def embedding_flops(layout: Layout) -> tuple[list[tuple[int, bool]], int]:
    """Of the captions themselves, in the form of flops.py."""
    text, D = layout.config.model.text, layout.config.model.width
    B, L, W = layout.micro_batch, text.length, text.width
    own = text.encoder == BYTES
    products = [
        (2 * B * L * W * D, own),
        (2 * B * (W if own else text.pooled) * D, own),
        (text.depth * 2 * B * L * W * 12 * W, True),
    ]
    return products, text.depth * 4 * B * L * L * W


def cross_attention_bytes(layout: Layout) -> int:
    """What one block's cross-attention saves, or computes again."""
    model = layout.config.model
    S, D, a = layout.tokens, model.width, layout.element
    places = layout.micro_batch * model.text.length
    inner = model.heads * model.width_of_head
    # The normalized tokens, query, key and value, mixed.
    elements = S * D + 2 * (S + places) * inner
    statistics = 2 * S * F32 + S * model.heads * F32
    if model.qk_norm:
        elements += (S + places) * inner
        statistics += (S + places) * model.heads * F32
    return elements * a + statistics


def embedding_bytes(layout: Layout) -> int:
    """What the captions' embedding saves, and the blocks look at."""
    text, D, a = layout.config.model.text, layout.config.model.width, layout.element
    M, W = layout.micro_batch * text.length, text.width
    # Features, normalized; projected, and with the null caption in place.
    kept = 2 * M * W * a + M * D * a
    # Of a block: its input, norms, query, key and value, mixed, and the MLP's two hidden ones.
    kept += text.depth * (2 * 4 + 8) * M * W * a
    return kept + (M * INT64 if text.encoder == BYTES else 0)
