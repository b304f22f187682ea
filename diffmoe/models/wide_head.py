"""A wide head behind a narrower backbone: DiT^DH of RAE (arXiv 2510.11690), after DDT (2504.05741).

What predicts latents of many channels has to be at least as wide as they are; this way not all
blocks have to. B samples, T tokens, D width of the backbone, W of the head.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from diffmoe.config import ModelConfig, WideHeadConfig
from diffmoe.models.blocks import Block, dense_mlp, patch_tokens, rotary_angles


class WideHead(nn.Module):
    """Dense blocks over the noisy latents, embedded anew, modulated by each token of the backbone.

    The condition of a token is SiLU(timestep + the backbone's token), projected to W. The latents
    get no positions but rotary ones; the backbone's tokens know where they are.
    """

    rotation: Tensor | None

    def __init__(self, model: ModelConfig, head: WideHeadConfig) -> None:
        super().__init__()
        width, patch, hidden = head.width, model.patch_size, int(head.width * model.mlp_ratio)
        self.patch_embed = nn.Conv2d(model.in_channels, width, patch, stride=patch)
        self.project = nn.Linear(model.width, width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                head.heads,
                head.width_of_head,
                model.qk_norm,
                dense_mlp(width, hidden, model.mlp_activation),
            )
            for _ in range(head.depth)
        )
        rotation = None
        if model.rope:
            rotation = rotary_angles(model.grid, head.width_of_head, model.rope_grid)
        self.register_buffer("rotation", rotation, persistent=False)

    def forward(
        self, x: Tensor, backbone_BTD: Tensor, time_BD: Tensor, null_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the last layer takes: tokens and the condition of each, both (B, T, W).

        x: noisy latents (B, C, H, W). backbone_BTD: its output.
        """
        condition_BTW = self.project(F.silu(time_BD[:, None] + backbone_BTD))
        x_BTW = patch_tokens(self.patch_embed, x)
        for block in self.blocks:
            x_BTW, _ = block(x_BTW, condition_BTW, time_BD, null_B, self.rotation)
        return x_BTW, condition_BTW
