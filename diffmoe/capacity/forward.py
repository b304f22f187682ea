"""One evaluation of the network on the way from noise to data, as its observers see it."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from diffmoe.models.moe import LayerRouting


class Forward(NamedTuple):
    """One evaluation of the network on the way.

    time: scalar tensor, 0 noise to 1 data. unconditional: the pass that guidance adds.
    routing: each MoE layer's; expert i took token s of the batch where selected_ES[i, s].
    """

    time: Tensor
    unconditional: bool
    routing: list[LayerRouting]


Observer = Callable[[Forward], None]
