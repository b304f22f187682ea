"""One evaluation of the network during sampling, as observers see it."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from diffmoe.models.moe import LayerRouting


class Forward(NamedTuple):
    """One evaluation of the network.

    time: scalar tensor, 0 is noise and 1 data. unconditional: whether guidance added this pass.
    routing: of each MoE layer; expert i took token s of the batch where selected_ES[i, s].
    """

    time: Tensor
    unconditional: bool
    routing: list[LayerRouting]


Observer = Callable[[Forward], None]
