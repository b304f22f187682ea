"""The matrix products of a step, in the order of diffmoe.models, and where the backward goes.

It gives a weight its gradient if the weight trains, and the weight's input if anything before it
does: below the first part that trains, nothing runs. FLOPs, a multiply-add counts as two.
B samples, S tokens, L tokens of a caption. Where a bool stands for a tensor, it says whether that
has a gradient.
"""

from collections.abc import Mapping

from diffmoe.models.lora import factor_names
from diffmoe.planning.layouts import Layout, Weight


class Products:
    """FLOPs of what has been noted so far.

    forward, backward: once. recomputed: what activation checkpointing runs again. last: the forward
    of the last product, which checkpointing leaves out where nothing behind it needs its result.
    """

    def __init__(self, parameters: Mapping[str, Weight]) -> None:
        self.parameters = parameters
        self.forward = self.backward = self.recomputed = self.last = 0

    def has(self, name: str) -> bool:
        """Whether the network has a parameter."""
        return name in self.parameters

    def trains(self, *names: str) -> bool:
        """Whether any of these trains. Those that the network lacks do not."""
        return any(self.has(name) and self.parameters[name].trains for name in names)

    def product(self, name: str, rows: int, x: bool, bias: str = "") -> bool:
        """Rows x times a weight, and the weight's LoRA. bias: the name of what is added."""
        weight = self.parameters[name]
        self.last = 2 * rows * weight.row
        self.forward += self.last
        self.backward += self.last * (weight.trains + x)
        y = x or self.trains(name, bias)
        a, b = factor_names(name)
        if self.has(a):
            y = self.product(b, rows, self.product(a, rows, x)) or y
        return y

    def linear(self, module: str, rows: int, x: bool) -> bool:
        return self.product(f"{module}.weight", rows, x, f"{module}.bias")

    def mix(self, rows: int, length: int, inner: int, x: bool) -> bool:
        """Attention of so many queries over `length` keys: two products, which it recomputes one of
        and makes four of in the backward."""
        self.last = 4 * rows * length * inner
        self.forward += self.last
        self.backward += self.last * 5 // 2 * x
        return x


def network_products(layout: Layout) -> Products:
    """Of one micro-batch on one GPU."""
    found = Products(layout.sizes.parameters)
    config, S, B = layout.config, layout.tokens, layout.micro_batch
    x = found.linear("patch_embed", S, False)
    time = found.linear("timestep_embed.fc2", B, found.linear("timestep_embed.fc1", B, False))
    captions, vector = False, found.trains("label_embed.weight")
    if config.model.text is not None:
        captions, vector = _caption_products(found, layout)
    for number in range(config.model.depth):
        x = _block_products(found, layout, f"blocks.{number}", x, time or vector, time, captions)
        if number + 1 == config.align.block:
            _projector_products(found, S, x)
    condition, rows = time or vector, B
    if config.model.wide_head is not None:
        x, condition, rows = *_wide_head_products(found, layout, x, time), S
    shift = found.linear("final_adaln", rows, condition)
    found.linear("final", S, x or shift)
    return found


def _block_products(
    found: Products, layout: Layout, name: str, x: bool, condition: bool, time: bool, captions: bool
) -> bool:
    model, S, B = layout.config.model, layout.tokens, layout.micro_batch
    inner = model.heads * model.width_of_head
    modulation = found.linear(f"{name}.adaln", B, condition)
    x = _attend(found, layout, name, inner, x or modulation)
    if model.text is not None:
        cross, length, start = f"{name}.cross_attention", model.text.length, found.forward
        query, key = (
            found.linear(f"{cross}.q", S, x),
            found.linear(f"{cross}.kv", B * length, captions),
        )
        mixed = found.mix(S, length, inner, query or key or _norms_train(found, cross))
        x = found.linear(f"{cross}.proj", S, mixed) or x
        # torch stops once it has all that the backward asks for: before the last product.
        found.recomputed += (found.forward - start - found.last) * x
    feed_forward, tokens = f"{name}.feed_forward", x or modulation
    if not found.has(f"{feed_forward}.router"):
        return _feed_forward(found, feed_forward, S, tokens)
    gates = routing_products(found, layout, feed_forward, tokens, x, time)
    start = found.forward
    y = mixture_products(found, layout, feed_forward, tokens) or gates
    found.recomputed += (found.forward - start) * y
    return y


def _wide_head_products(
    found: Products, layout: Layout, backbone: bool, time: bool
) -> tuple[bool, bool]:
    """-> its tokens, and the condition of each."""
    head, S = layout.config.model.wide_head, layout.tokens
    assert head is not None
    condition = found.linear("wide_head.project", S, backbone or time)
    x = found.linear("wide_head.patch_embed", S, False)
    for number in range(head.depth):
        block = f"wide_head.blocks.{number}"
        modulation = found.linear(f"{block}.adaln", S, condition)
        x = _attend(found, layout, block, head.width, x or modulation)
        x = _feed_forward(found, f"{block}.feed_forward", S, x or modulation)
    return x, condition


def _attend(found: Products, layout: Layout, block: str, inner: int, x: bool) -> bool:
    """Of a block's tokens to each other."""
    name, start = f"{block}.attention", found.forward
    x = _attention(found, name, layout.tokens, layout.tokens_per_sample, inner, x)
    found.recomputed += (found.forward - start) * x
    return x


def _feed_forward(found: Products, name: str, rows: int, x: bool) -> bool:
    """Of a dense block."""
    start = found.forward
    y = _mlp(found, name, rows, x)
    found.recomputed += (found.forward - start - found.last) * y
    return y


def _attention(found: Products, name: str, rows: int, length: int, inner: int, x: bool) -> bool:
    query = found.linear(f"{name}.qkv", rows, x) or _norms_train(found, name)
    return found.linear(f"{name}.proj", rows, found.mix(rows, length, inner, query))


def _norms_train(found: Products, attention: str) -> bool:
    return found.trains(f"{attention}.q_norm.weight", f"{attention}.k_norm.weight")


def _mlp(found: Products, name: str, rows: int, x: bool) -> bool:
    if found.has(f"{name}.fc1.weight"):
        return found.linear(f"{name}.fc2", rows, found.linear(f"{name}.fc1", rows, x))
    gate, up = found.linear(f"{name}.gate", rows, x), found.linear(f"{name}.up", rows, x)
    return found.linear(f"{name}.down", rows, gate or up)


def routing_products(
    found: Products, layout: Layout, name: str, tokens: bool, plain: bool, time: bool
) -> bool:
    """Of one MoE layer's router and predictor. tokens, plain, time: as `MoEFeedForward.forward` has
    them. -> the gates.
    """
    S = layout.tokens
    hidden = tokens if layout.config.moe.router_input == "modulated" else plain
    if found.has(f"{name}.router_hidden.weight"):
        hidden = found.linear(f"{name}.router_hidden", S, hidden)
    if found.has(f"{name}.target_head.weight"):
        found.linear(f"{name}.target_head", S, hidden)
    gates = found.product(f"{name}.router", S, hidden)
    if found.has(f"{name}.router_time"):
        gates = found.product(f"{name}.router_time", layout.micro_batch, time) or gates
    predictor = f"{name}.capacity_predictor"
    if found.has(f"{predictor}.out.weight"):  # on detached tokens
        found.linear(f"{predictor}.out", S, found.linear(f"{predictor}.hidden", S, False))
    return gates


def mixture_products(found: Products, layout: Layout, name: str, tokens: bool) -> bool:
    """Of one MoE layer's experts, those beside the routed ones included. -> what they add."""
    experts = f"{name}.experts"

    def product(x: bool, matrix: str, bias: str) -> bool:
        return found.product(f"{experts}.{matrix}", layout.rows, x, f"{experts}.{bias}")

    if found.has(f"{experts}.w_in"):
        hidden = product(tokens, "w_in", "b_in")
    else:
        gate, up = product(tokens, "w_gate", ""), product(tokens, "w_up", "")
        hidden = gate or up
    y = product(hidden, "w_out", "b_out")
    beside = {"shared_expert": layout.tokens, "unconditional_expert": layout.rows_apart}
    for kind, rows in beside.items():
        if any(found.has(f"{name}.{kind}.{first}.weight") for first in ("fc1", "gate")):
            y = _mlp(found, f"{name}.{kind}", rows, tokens) or y
    return y


def _projector_products(found: Products, rows: int, x: bool) -> None:
    if found.has("projector.layers.weight"):
        found.linear("projector.layers", rows, x)
        return
    for number in (0, 2, 4):
        x = found.linear(f"projector.layers.{number}", rows, x)


def _caption_products(found: Products, layout: Layout) -> tuple[bool, bool]:
    """-> the captions' tokens, and what captions add to the condition."""
    text, B = layout.config.model.text, layout.micro_batch
    assert text is not None
    rows, name = B * text.length, "text_embed.encoder"
    features = found.trains(f"{name}.embed.weight", f"{name}.places")
    for number in range(text.depth):
        block = f"{name}.blocks.{number}"
        features = _attention(found, f"{block}.attention", rows, text.length, text.width, features)
        features = _mlp(found, f"{block}.feed_forward", rows, features)
    tokens = found.linear("text_embed.project", rows, features)
    tokens = tokens or found.trains("text_embed.null_token")
    if not found.has("text_embed.pooled_embed.weight"):
        return tokens, False
    vector = found.linear("text_embed.pooled_embed", B, features)
    return tokens, vector or found.trains("text_embed.null_pooled")
