"""What a run is planned for."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One GPU and its links. The defaults are an H100 with NVLink, and 400 Gbit/s of network a GPU.

    memory: bytes. node_memory: of the host, what a job gets of each node. flops_*: what products
    reach, operations a second: 40 % of the card's sheet. within, between, device, host: bytes a
    second that reach a GPU from its node's others, from other nodes, from its own memory, and from
    its host's.
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
        return (
            f"assumed: products reach {self.flops_bf16 / 1e12:.0f} TFLOP/s in bf16 and "
            f"{self.flops_fp32 / 1e12:.0f} in fp32 (TF32); a GPU gets {self.within / 1e9:.0f} GB/s "
            f"inside its node and {self.between / 1e9:.0f} between nodes, {self.device / 1e12:g} "
            f"TB/s from its own memory and {self.host / 1e9:.0f} GB/s from its host's; nothing "
            "overlaps; no time for kernel launches and data"
        )
