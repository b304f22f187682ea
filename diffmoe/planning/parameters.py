"""Every parameter of a configuration, and the optimizer that it goes to."""

import torch

from diffmoe.config import Config
from diffmoe.models.dit import DiT
from diffmoe.models.frozen import frozen_names
from diffmoe.models.matrices import hidden_matrices
from diffmoe.parallel.orthogonalize import Matrices


def parameter_table(config: Config) -> str:
    """One line per parameter: name, shape, optimizer, rate after the warm-up, weight decay.

    Frozen ones have neither. Of Muon also the matrices that it orthogonalizes, (out, in), and by
    what their updates are multiplied beside the rate. Experts are all there, whatever ranks
    share them.
    """
    with torch.device("meta"):
        network = DiT(config.model, config.moe, align=config.align, lora=config.lora)
    optimizer = config.optimizer
    matrices = hidden_matrices(network) if optimizer.type == "muon" else {}
    frozen = frozen_names(network, config.training)
    lines, elements = [], {"muon": 0, "adamw": 0, "frozen": 0}
    for name, parameter in network.named_parameters():
        kind, rate, decay, more = "adamw", optimizer.learning_rate, optimizer.weight_decay, ""
        if name in frozen:
            kind, rate, decay = "frozen", 0.0, 0.0
        elif name in matrices:
            kind, decay = "muon", optimizer.muon.weight_decay
            rate = optimizer.muon.learning_rate or rate
            more = _shown(matrices[name], config)
        elements[kind] += parameter.numel()
        shape = "x".join(map(str, parameter.shape))
        lines.append(f"{name:<48} {shape:>14}  {kind:<6}  {rate:<8g} {decay:<8g} {more}".rstrip())
    head = f"{'parameter':<48} {'shape':>14}  {'by':<6}  {'rate':<8} {'decay':<8} matrices"
    total = ", ".join(
        f"{count / 1e6:.1f} million {'' if kind == 'frozen' else 'by '}{kind}"
        for kind, count in elements.items()
        if count
    )
    return "\n".join([head if matrices else head.removesuffix(" matrices"), *lines, total])


def _shown(stack: Matrices, config: Config) -> str:
    out, into = stack.rows, stack.columns
    if stack.inputs_first:
        out, into = into, out
    return f"{stack.number} of {out}x{into}, times {stack.factor(config.optimizer.muon.scale):.3g}"
