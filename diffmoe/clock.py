"""The clock of a training run. Progress is counted in samples; everything periodic follows it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class Clock(BaseModel):
    """How far a training has come.

    samples: seen so far, over all ranks. step: optimizer steps so far, skipped ones included.
    skipped: steps whose loss or gradients were not finite, and which changed nothing.
    """

    model_config = ConfigDict(frozen=True)

    samples: Count
    step: Count
    skipped: Count

    @property
    def updates(self) -> int:
        """How often the weights have changed."""
        return self.step - self.skipped
