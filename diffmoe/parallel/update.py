"""How an optimizer updates a parameter, and which parameters share a group of it."""

from typing import Any, NamedTuple

from diffmoe.parallel.orthogonalize import Matrices


class Update(NamedTuple):
    """rate: after the warm-up. decay: decoupled. matrices: those of Muon; None: AdamW's."""

    rate: float
    decay: float
    matrices: Matrices | None = None

    @property
    def shared(self) -> tuple[float, float, bool]:
        """What the parameters of a group agree in, beside their type and ranks."""
        return self.rate, self.decay, self.matrices is not None

    @property
    def options(self) -> dict[str, Any]:
        """Of a parameter group. peak_lr: what a schedule starts from."""
        return {"lr": self.rate, "peak_lr": self.rate, "weight_decay": self.decay}
