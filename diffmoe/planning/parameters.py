"""Every parameter of a configuration: its role, and how the optimizer updates it."""

import torch

from diffmoe.config import Config
from diffmoe.models.dit import DiT
from diffmoe.models.frozen import frozen_names
from diffmoe.models.roles import roles
from diffmoe.models.updates import updates
from diffmoe.parallel.orthogonalize import Matrices


def parameter_table(config: Config) -> str:
    """One line per parameter: name, shape, role, optimizer, rate after the warm-up, weight decay.

    Frozen ones have neither. Of Muon also the matrices that it orthogonalizes, (out, in), and by
    what their updates are multiplied beside the rate. Experts are all there, whatever ranks
    share them.
    """
    with torch.device("meta"):
        network = DiT(config.model, config.moe, align=config.align, lora=config.lora)
    by_role, how = roles(network), updates(network, config.optimizer)
    frozen = frozen_names(network, config.training)
    row = f"{{:<{max(map(len, by_role))}}} {{:>14}}  {{:<10}}  {{:<6}}  {{:<8}} {{:<8}} {{}}"
    lines, elements = [], {"muon": 0, "adamw": 0, "frozen": 0}
    for name, parameter in network.named_parameters():
        kind, (rate, decay, stack), more = "adamw", how[name], ""
        if name in frozen:
            kind, rate, decay = "frozen", 0.0, 0.0
        elif stack is not None:
            kind, more = "muon", _shown(stack, config)
        elements[kind] += parameter.numel()
        shape, role = "x".join(map(str, parameter.shape)), by_role[name].name
        lines.append(row.format(name, shape, role, kind, f"{rate:g}", f"{decay:g}", more).rstrip())
    of_muon = "matrices" if elements["muon"] else ""
    head = row.format("parameter", "shape", "role", "by", "rate", "decay", of_muon).rstrip()
    total = ", ".join(
        f"{count / 1e6:.1f} million {'' if kind == 'frozen' else 'by '}{kind}"
        for kind, count in elements.items()
        if count
    )
    return "\n".join([head, *lines, total])


def _shown(stack: Matrices, config: Config) -> str:
    out, into = stack.rows, stack.columns
    if stack.inputs_first:
        out, into = into, out
    return f"{stack.number} of {out}x{into}, times {stack.factor(config.optimizer.muon.scale):.3g}"
