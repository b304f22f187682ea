"""The machine that a run is planned for."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A GPU and its links. Defaults: H100 with NVLink, and 400 Gbit/s of network per GPU.

    memory: bytes of the GPU. node_memory: bytes of host memory that a job gets on each node.
    flops_*: FLOP/s that matrix products achieve; default 40 % of the data sheet. within, between,
    device, host: bytes/s from GPUs of the same node, from other nodes, from the GPU's own memory,
    and from host memory.
    """

    memory: float = 80e9
    node_memory: float = math.inf
    flops_bf16: float = 0.4 * 989e12
    flops_fp32: float = 0.4 * 495e12
    within: float = 300e9
    between: float = 40e9
    device: float = 2.5e12
    host: float = 25e9

    def assumptions(self) -> str:
        """What an estimate assumes, in a sentence for the user."""
        return (
            f"assumed: matrix products achieve {self.flops_bf16 / 1e12:.0f} TFLOP/s in bf16 and "
            f"{self.flops_fp32 / 1e12:.0f} in fp32 (TF32); per GPU {self.within / 1e9:.0f} GB/s "
            f"inside a node and {self.between / 1e9:.0f} between nodes, {self.device / 1e12:g} "
            f"TB/s from its own memory and {self.host / 1e9:.0f} GB/s from host memory; nothing "
            "overlaps; kernel launches and data loading take no time"
        )
