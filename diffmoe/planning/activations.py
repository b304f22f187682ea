"""Bytes of activations that the forward saves for the backward, on one GPU, for one micro-batch.

Follows diffmoe.models: one line per tensor that autograd saves; shared storage counts once.
S tokens, D width, N token-expert pairs, H hidden width, E experts, B samples; an element has `a`
bytes.
"""

from diffmoe.config import WideHeadConfig
from diffmoe.planning import captions
from diffmoe.planning.layouts import Layout

F32, INT64 = 4, 8


def activation_bytes(layout: Layout) -> int:
    """At the peak: with checkpointing, including what one part of a block recomputes."""
    checkpointing = layout.config.training.activation_checkpointing
    return kept_bytes(layout) + (max(_checkpointed(layout)) if checkpointing else 0)


def kept_bytes(layout: Layout) -> int:
    """What is held at the end of the forward."""
    config = layout.config
    model = config.model
    S, B, D, a = layout.tokens, layout.micro_batch, model.width, layout.element
    dense_layers, moe_layers = model.depth - layout.moe_layers, layout.moe_layers
    # silu(condition), six parts of the modulation, 1 + scale twice.
    block = 9 * B * D * a
    # Tokens in, tokens after attention, and norm 2: its output, mean and deviation; then the
    # modulated tokens and the feed-forward's output.
    block += 5 * S * D * a + 2 * S * F32
    # Final norm (input, output, modulated) and the prediction against its target, in fp32.
    patch = model.patch_size**2 * model.in_channels * (2 if model.learn_sigma else 1)
    last = D if model.wide_head is None else model.wide_head.width
    ends = 3 * S * last * a + 6 * B * D * a + 2 * S * patch * F32
    kept = model.depth * block + ends
    if model.wide_head is not None:
        kept += _wide_head(layout, model.wide_head)
    if moe_layers:
        kept += moe_layers * _routing(layout)
    if model.text is not None:  # tokens before and after cross-attention
        kept += captions.embedding_bytes(layout) + model.depth * S * D * a
    if config.align.block is not None:
        kept += _alignment(layout)
    if config.training.activation_checkpointing:
        return kept
    # Of LoRA what lies between its factors, once for each token or row of its weight.
    sizes, rank = layout.sizes, config.lora.rank
    kept += rank * (sizes.lora_dense * S + sizes.lora_experts * layout.rows) * a
    attention, cross, dense, mixture, *of_head = _checkpointed(layout)
    kept += model.depth * (attention + cross) + dense_layers * dense + moe_layers * mixture
    return kept + (0 if model.wide_head is None else model.wide_head.depth * sum(of_head))


def _wide_head(layout: Layout, head: WideHeadConfig) -> int:
    """What it saves with checkpointing, too; its modulations are of tokens, not of samples."""
    S, D, W, a = layout.tokens, layout.config.model.width, head.width, layout.element
    # As in a block of the backbone, but for the 1 + scale of attention, see `_checkpointed`.
    block = (8 + 5) * S * W * a + 2 * S * F32
    # Timestep and token, before and after the activation; the condition, its activation and 1 +
    # scale of the last layer.
    return head.depth * block + 2 * S * D * a + 3 * S * W * a


def _alignment(layout: Layout) -> int:
    """What the projector and its loss save; the block's tokens are counted there."""
    align, S, a = layout.config.align, layout.tokens, layout.element
    kept = 0
    if align.projector == "mlp":  # both hidden layers, before and after the activation
        kept += 4 * S * align.hidden * a
    # Projected tokens and targets in fp32, and what the cosine makes of both.
    return kept + 4 * S * align.width * F32


def _checkpointed(layout: Layout) -> tuple[int, ...]:
    """Bytes saved (or recomputed) by self-attention, cross-attention, a dense MLP, an MoE layer;
    by self-attention and MLP of the wide head, if there is one.
    """
    model, moe = layout.config.model, layout.config.moe
    S, D, a = layout.tokens, model.width, layout.element
    dense = 0
    if layout.moe_layers < model.depth:
        dense = _mlp(layout, D)
    mixture = 0
    if layout.moe_layers:
        shared = _hidden(moe.shared_expert_activation) * S * int(D * moe.shared_expert_ratio) * a
        mixture = _mixture(layout) + shared
    cross = 0 if model.text is None else captions.cross_attention_bytes(layout)
    parts = (_attention(layout, D, model.heads, model.width_of_head), cross, dense, mixture)
    head = model.wide_head
    if head is None:
        return parts
    attention = _attention(layout, head.width, head.heads, head.width_of_head)
    attention += S * head.width * a  # 1 + scale, which is of tokens here
    return (*parts, attention, _mlp(layout, head.width))


def _mlp(layout: Layout, width: int) -> int:
    """What a dense MLP saves (or recomputes)."""
    model, S = layout.config.model, layout.tokens
    return _hidden(model.mlp_activation) * S * int(width * model.mlp_ratio) * layout.element


def _attention(layout: Layout, D: int, heads: int, head_width: int) -> int:
    model = layout.config.model
    S, a = layout.tokens, layout.element
    inner = heads * head_width
    # Norm 1's output and statistics, modulated tokens; query, key, value; their mix, projected.
    elements = 3 * S * D + 4 * S * inner
    statistics = 2 * S * F32 + S * heads * F32  # and one per row of the softmax
    if model.qk_norm:  # normalized query and key
        elements += 2 * S * inner
        statistics += 2 * S * heads * F32
    if model.rope:  # rotated query and key
        elements += 2 * S * inner
    return elements * a + statistics


def _mixture(layout: Layout) -> int:
    """What the experts save (or recompute)."""
    config = layout.config
    N, D, a = layout.rows, config.model.width, layout.element
    H = int(D * config.moe.expert_ratio)
    hidden = _hidden(config.moe.activation)
    # Rows, hidden before and after the activation, the experts' output; flat token indices.
    return N * (2 * D + hidden * H) * a + N * (INT64 + a)


def _hidden(activation: str) -> int:
    """Number of hidden tensors that autograd saves in an MLP: before and after the activation."""
    return 4 if activation == "swiglu" else 2


def _routing(layout: Layout) -> int:
    """What routing and the capacity predictor save, with checkpointing too."""
    config = layout.config
    S, N, D, a = layout.tokens, layout.rows, config.model.width, layout.element
    E = config.moe.experts
    saved = S * E * F32 + N * (INT64 + F32)  # scores; token indices and gates
    if a != F32:
        saved += S * D * F32  # tokens, for all that routes
    if config.moe.type == "race":
        saved += 2 * S * D * F32  # its hidden layer, before and after the activation
        if a != F32 and config.moe.target_loss_weight:
            saved += S * D * a  # that layer, for the head
    if config.moe.type == "diffmoe":
        saved += 2 * S * D * F32 + 2 * S * E * F32  # hidden layer, logits and their target
    return saved
