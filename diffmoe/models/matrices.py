"""Which parameters are matrices of blocks: those that Muon orthogonalizes."""

from torch import nn

from diffmoe.models.blocks import MLP, Attention, CrossAttention, SwiGLU
from diffmoe.models.experts import Experts
from diffmoe.parallel.orthogonalize import Matrices

# Of torch's linear layers: by name, how many matrices their weight stacks.
_STACKED: dict[type, dict[str, int]] = {
    Attention: {"qkv": 3, "proj": 1},
    CrossAttention: {"q": 1, "kv": 2, "proj": 1},
    MLP: {"fc1": 1, "fc2": 1},
    SwiGLU: {"gate": 1, "up": 1, "down": 1},
}


def hidden_matrices(network: nn.Module) -> dict[str, Matrices]:
    """By name: attention, feed-forwards and this rank's experts, of the encoder of bytes, too.

    Queries, keys and values are three matrices (arXiv 2608.02502), and each expert's are its own.
    Not embeddings, the first and the last layer, modulations, routers, biases (Jordan et al.).
    """
    found = {}
    for prefix, module in network.named_modules():
        for name, count in _STACKED.get(type(module), {}).items():
            rows, columns = module.get_parameter(f"{name}.weight").shape
            found[f"{prefix}.{name}.weight"] = Matrices(count, rows // count, columns, False)
        if isinstance(module, Experts):
            for name, parameter in module.named_parameters():
                if name in Experts.matrices:
                    experts, width, hidden = parameter.shape
                    found[f"{prefix}.{name}"] = Matrices(experts, width, hidden, True)
    return found
