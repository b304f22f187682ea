"""Oracle 1: what the paper's release computed (tests/reference), to 2e-5 absolute in fp32."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from diffmoe.conversion.release import config_from_release, from_release
from diffmoe.diffusion.flow import FlowMatching
from diffmoe.models.blocks import grid_positions
from diffmoe.models.dit import DiT, DiTOutput
from diffmoe.models.moe import routing_loss
from diffmoe.training.routing_state import RoutingState
from tests.helpers.devices import fp32_products

REFERENCE = Path(__file__).parents[1] / "reference"
DIFFMOE = [
    "diffmoe_interleave",
    "diffmoe_every_layer",
    "diffmoe_swiglu",
    "diffmoe_shared_capacity2",
]
MODELS = [*DIFFMOE, "ecdit", "tcdit", "dense"]


class Release:
    """A reference file, its tensors, and our model with its weights."""

    def __init__(self, name: str, device: torch.device) -> None:
        with safe_open(REFERENCE / f"{name}.safetensors", framework="pt") as file:
            metadata = file.metadata()
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.tensors = {key: tensor.to(device) for key, tensor in stored.items()}
        self.config = config_from_release(metadata["kind"], json.loads(metadata["config"]))
        self.parameter_count = int(metadata["params_trainable"])
        self.model = DiT(self.config.model, self.config.moe).to(device)
        self.model.load_state_dict(self.part("weights"))
        self.objective = FlowMatching()

    def part(self, prefix: str) -> dict[str, Tensor]:
        """All tensors `prefix.*`, under our names."""
        prefix += "."
        return from_release(
            {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        )

    def forward(self, samples: slice = slice(None)) -> DiTOutput:
        t = self.tensors["in.t"][samples]
        x_t = self.objective.corrupt(
            self.tensors["in.x1"][samples], self.tensors["in.noise"][samples], t
        )
        return self.model(x_t, t, self.tensors["in.y"][samples])

    def losses(self) -> tuple[DiTOutput, Tensor, Tensor | float]:
        output = self.forward()
        data, noise, t = (self.tensors[f"in.{key}"] for key in ("x1", "noise", "t"))
        x_t = self.objective.corrupt(data, noise, t)
        mse = self.objective.loss(output.prediction, x_t, data, noise, t)["loss"].mean()
        return output, mse, routing_loss(output.routing, self.config.moe)


@pytest.fixture(params=MODELS)
def release(request: pytest.FixtureRequest, device: torch.device) -> Release:
    return Release(request.param, device)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def test_parameter_count_equals_the_release(release: Release):
    assert release.model.parameter_count() == release.parameter_count


def test_fixed_positions_equal_the_release(release: Release):
    close(grid_positions(32, (4, 4)), release.tensors["weights.pos_embed"][0].cpu())


def test_training_forward_and_every_gradient_equal_the_release(release: Release):
    output, mse, auxiliary = release.losses()
    close(output.prediction, release.tensors["train.output"])
    close(mse, release.tensors["train.mse"])
    (mse + auxiliary).backward()
    expected = release.part("grad")
    gradients = {name: p.grad for name, p in release.model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize("name", DIFFMOE)
def test_masks_capacity_logits_and_losses_equal_the_release(name: str, device: torch.device):
    release = Release(name, device)
    output, _, auxiliary = release.losses()
    close(auxiliary.detach(), release.tensors["train.capacity_loss"])
    blocks = [
        i for i, b in enumerate(release.model.blocks) if b.feed_forward in release.model.moe_layers
    ]
    assert len(blocks) == len(output.routing) > 0
    for block, layer in zip(blocks, output.routing, strict=True):
        target = release.tensors[f"train.capacity_target.{block}"].flatten(0, 1)
        assert torch.equal(layer.selected_ES.t(), target.bool())
        close(
            layer.capacity_logits_SE,
            release.tensors[f"train.capacity_logits.{block}"].flatten(0, 1),
        )
        close(layer.losses["capacity"].detach(), release.tensors[f"train.capacity_bce.{block}"])


@pytest.mark.parametrize("name", DIFFMOE)
def test_thresholds_and_pooled_evaluation_equal_the_release(name: str, device: torch.device):
    release = Release(name, device)
    tracker = RoutingState(release.model)
    for forward, key in ((0, "buffers_after"), (40, "buffers_eval")):
        for _ in range(max(1, forward)):
            tracker.observe(release.forward().routing)
            tracker.step(tracker.seen())
        for buffer_name, expected in release.part(key).items():
            close(release.model.get_buffer(buffer_name), expected)
    release.model.eval()
    with torch.no_grad():
        close(release.forward().prediction, release.tensors["eval.output"])
        close(release.forward(slice(0, 2)).prediction, release.tensors["eval.output_first_two"])


@pytest.mark.parametrize("name", ["ecdit", "tcdit", "dense"])
def test_baselines_evaluate_as_the_release(name: str, device: torch.device):
    release = Release(name, device)
    release.model.eval()
    with torch.no_grad():
        close(release.forward().prediction, release.tensors["eval.output"])
        close(release.forward(slice(0, 2)).prediction, release.tensors["eval.output_first_two"])


def test_three_adamw_steps_equal_the_release(release: Release):
    optimizer = torch.optim.AdamW(release.model.parameters(), lr=1e-3, weight_decay=0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        _, mse, auxiliary = release.losses()
        # The release reports the capacity loss as part of the loss, but not the balancing loss.
        reported = mse if release.config.moe.type == "token_choice" else mse + auxiliary
        (mse + auxiliary).backward()
        optimizer.step()
        losses.append(reported.detach())
    close(torch.stack(losses), release.tensors["steps.loss"])
    # Adam divides by the gradient's size, so rounding in a tiny gradient moves a weight by a part
    # of the step (3 steps of 1e-3).
    expected = release.tensors["steps.final_output_layer"]
    torch.testing.assert_close(release.model.final.weight.detach(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("kind", "most"), [("tf32", 4e-3), ("bf16", 3e-2)])
def test_the_types_of_a_gpu_are_off_by_their_rounding(release: Release, kind: str, most: float):
    """Against fp32, relative, where C = E leaves no choice that rounding could turn."""
    device = release.tensors["in.t"].device
    if kind == "tf32" and device.type == "cpu":
        pytest.skip("a CPU has no TF32")
    experts = release.config.moe.experts
    for layer in release.model.moe_layers:
        all_experts = {"capacity": float(experts), "top_k": experts}
        layer.moe = layer.moe.model_copy(update=all_experts)
    expected, *_ = release.losses()
    in_bf16 = torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16")
    with fp32_products("high"), in_bf16:
        found, *_ = release.losses()
    off = (found.prediction - expected.prediction).norm() / expected.prediction.norm()
    assert 0 < off < most
