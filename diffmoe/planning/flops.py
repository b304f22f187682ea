"""FLOPs of matrix products; a multiply-add counts as two."""

from itertools import pairwise

from diffmoe.parallel.orthogonalize import flops
from diffmoe.planning import captions
from diffmoe.planning.layouts import Layout
from diffmoe.planning.memory import parameter_groups


def forward_flops(layout: Layout) -> int:
    """Of the forward of one micro-batch on one GPU."""
    products, attention = _forward(layout)
    return sum(flops for flops, _ in products) + attention


def step_flops(layout: Layout) -> int:
    """Of one optimizer step on one GPU: forward and backward of all micro-batches.

    With checkpointing, the forward of attention and feed-forwards counts twice. Weights that do not
    train count as if they did, which is more than LoRA's factors add.
    """
    products, attention = _forward(layout)
    # Backward of a product: one for the weight's gradient, one for the input's if it has one.
    work = sum(flops * (2 + has_input) for flops, has_input in products)
    # Backward of attention's two products: four, and one is recomputed.
    work += attention + attention * 5 // 2
    if layout.config.training.activation_checkpointing:
        work += _recomputed(layout)
    return work * layout.accumulation


def newton_schulz_flops(layout: Layout) -> int:
    """Of one optimizer step on one GPU, on average over the ranks; 0 without Muon."""
    muon = layout.config.optimizer.muon
    return sum(
        sum(flops(stack, muon.steps, muon.newton_schulz) for stack in group.matrices) // group.ranks
        for group in parameter_groups(layout)
    )


def _recomputed(layout: Layout) -> int:
    model = layout.config.model
    S, D, T = layout.tokens, model.width, layout.tokens_per_sample
    inner = model.heads * model.width_of_head
    attention = model.depth * (2 * S * D * 4 * inner + 4 * S * T * inner)
    if model.text is not None:
        attention += model.depth * captions.cross_attention_recomputed(layout)
    mlps = _dense_layers(layout)
    if model.wide_head is not None:
        W, depth = model.wide_head.width, model.wide_head.depth
        attention += depth * (2 * S * W * 4 * W + 4 * S * T * W)
        mlps += depth * _mlp(layout, W)
    # torch stops once it has all saved tensors, so it skips the dense MLP's last product.
    matrices = _matrices(model.mlp_activation)
    return attention + mlps * (matrices - 1) // matrices + _mixtures(layout)


def _dense_layers(layout: Layout) -> int:
    model = layout.config.model
    return (model.depth - layout.moe_layers) * _mlp(layout, model.width)


def _mlp(layout: Layout, width: int) -> int:
    """Of the forward of one dense MLP."""
    model = layout.config.model
    per_token = 2 * _matrices(model.mlp_activation) * width * int(width * model.mlp_ratio)
    return layout.tokens * per_token


def _matrices(activation: str) -> int:
    """Weight matrices of an MLP."""
    return 3 if activation == "swiglu" else 2


def _mixtures(layout: Layout) -> int:
    return layout.moe_layers * mixture_flops(layout)


def mixture_flops(layout: Layout) -> int:
    """Of the forward of one MoE layer's experts, the shared expert included."""
    moe, S, D = layout.config.moe, layout.tokens, layout.config.model.width
    rows = layout.rows + layout.rows_apart
    experts = _matrices(moe.activation) * 2 * rows * D * int(D * moe.expert_ratio)
    shared = _matrices(moe.shared_expert_activation) * 2 * S * D * int(D * moe.shared_expert_ratio)
    return experts + shared


def projector_products(layout: Layout) -> list[int]:
    """FLOPs of the forward of each product of an aligned run's projector."""
    align, S, D = layout.config.align, layout.tokens, layout.config.model.width
    if align.block is None:
        return []
    if align.projector == "conv":
        return [2 * S * 9 * D * align.width]
    sizes = (D, align.hidden, align.hidden, align.width)
    return [2 * S * into * out for into, out in pairwise(sizes)]


def router_products(layout: Layout) -> list[tuple[int, bool]]:
    """Of one MoE layer: (FLOPs, whether the input has a gradient) of router and predictor."""
    moe, S, D = layout.config.moe, layout.tokens, layout.config.model.width
    if moe.type == "dense":
        return []
    products = [(2 * S * D * moe.experts, True)]
    if moe.type == "race":
        products.append((2 * S * D * D, True))
        if moe.target_loss_weight:
            patch = layout.config.model.patch_size**2 * layout.config.model.in_channels
            products.append((2 * S * D * patch, True))
    if moe.type == "diffmoe":  # on detached tokens
        products += [(2 * S * D * D, False), (2 * S * D * moe.experts, True)]
    return products


def _forward(layout: Layout) -> tuple[list[tuple[int, bool]], int]:
    """Of the forward of one micro-batch: (products, FLOPs of attention's two products).

    products: (FLOPs, whether the input has a gradient) of each.
    """
    model = layout.config.model
    S, B, D, T = layout.tokens, layout.micro_batch, model.width, layout.tokens_per_sample
    patch = model.patch_size**2 * model.in_channels
    out = patch * (2 if model.learn_sigma else 1)
    inner = model.heads * model.width_of_head
    products = [
        (2 * S * patch * D, False),
        (2 * B * 256 * D, False),
        (2 * B * D * D, True),
        (model.depth * 2 * S * D * 4 * inner, True),
        (model.depth * 2 * B * D * 6 * D, True),
        (_dense_layers(layout) + _mixtures(layout), True),
        *((layout.moe_layers * work, has_input) for work, has_input in router_products(layout)),
        *((work, True) for work in projector_products(layout)),
    ]
    attention = model.depth * 4 * S * T * inner
    if model.wide_head is None:
        products += [(2 * B * D * 2 * D, True), (2 * S * D * out, True)]
    else:  # whose modulations are of tokens, not of samples
        W, depth = model.wide_head.width, model.wide_head.depth
        products += [
            (2 * S * patch * W, False),
            (2 * S * D * W, True),
            (depth * (2 * S * W * (4 + 6) * W + _mlp(layout, W)), True),
            (2 * S * W * 2 * W, True),
            (2 * S * W * out, True),
        ]
        attention += depth * 4 * S * T * W
    if model.text is not None:
        cross, mixing = captions.cross_attention_flops(layout)
        embedding, own_mixing = captions.embedding_flops(layout)
        products += [(model.depth * cross, True), *embedding]
        attention += model.depth * mixing + own_mixing
    return products, attention
