"""What all sections of the configuration share."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    # Infinity has a meaning in none of the settings.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def divisors(number: int) -> str:
    """Those of a number, for the end of a message."""
    if number > 1 << 20:  # of a damaged file: not worth counting
        return f"a divisor of {number}"
    found = [str(n) for n in range(1, number + 1) if number % n == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
