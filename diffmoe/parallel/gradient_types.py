"""In which types gradients accumulate over micro-batches, and are summed over ranks."""

from collections.abc import Mapping
from typing import Any

from diffmoe.errors import UserError


def gradient_types(ds_settings: Mapping[str, Any]) -> tuple[str, str]:
    """(of accumulation, of reduction), each fp32 or bf16; fp32 unless the DeepSpeed JSON says else.

    A sum in bf16 loses what lies below its step: the more micro-batches, the more of the gradient.
    Raises UserError for another type.
    """
    accumulated = ds_settings.get("data_types", {}).get("grad_accum_dtype") or "fp32"
    # What was rounded already is not worth more bytes between ranks.
    reduced = ds_settings.get("communication_data_type") or accumulated
    for key, value in (
        ("data_types.grad_accum_dtype", accumulated),
        ("communication_data_type", reduced),
    ):
        if value not in ("fp32", "bf16"):
            raise UserError(f"{key}={value!r} in the DeepSpeed JSON: choose fp32 or bf16")
    return accumulated, reduced
