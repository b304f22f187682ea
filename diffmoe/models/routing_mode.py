"""How a DiffMoE network routes in evaluation: one value, kept by the network."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from diffmoe.errors import UserError

Kind = Literal["per_token", "pooled", "static"]


@dataclass(frozen=True, eq=False)
class RoutingMode:
    """For `DiT.routing`, or `with network.routed(mode):`.

    kind: per_token (Eq. 14; an image does not depend on its batch mates), pooled (Alg. 4) or
    static (each expert's best K tokens of the batch, as in training).
    capacity: C of static routing; None: that of training.
    calibrated_LE: calibrated thresholds (L, E) of per_token and pooled, as logits; None: those that
    training tracked.

    Raises UserError for a kind that does not exist, or a capacity with another kind than static.
    """

    kind: Kind = "per_token"
    capacity: float | None = None
    calibrated_LE: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"routing {self.kind}: choose per_token, pooled or static")
        if self.capacity is not None and self.kind != "static":
            raise UserError(
                f"capacity {self.capacity:g} belongs to static routing; {self.kind} uses "
                "thresholds (tools/calibrate.py finds those of a capacity)"
            )


def check_capacity(capacity: float, experts: int) -> None:
    """Raise UserError for a capacity that no routing can meet, or NaN."""
    if not 0 < capacity <= experts:
        raise UserError(f"capacity {capacity:g}: choose one above 0, at most {experts} (experts)")
