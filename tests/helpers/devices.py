"""The devices on which an oracle's numbers are computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """highest: in full fp32; high: in TF32, on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
