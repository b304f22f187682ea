from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor


@pytest.fixture(scope="session")
def reference() -> dict[str, Tensor]:
    """Numbers of the paper's release (its Gaussian diffusion), computed on a CPU in fp32."""
    return load_file(Path(__file__).parents[1] / "reference" / "ddpm.safetensors")
