"""The experts' stacked MLPs: batched, through the grouped kernel and in a loop."""

import pytest
import torch
from torch import Tensor, nn

from diffmoe.models import experts as experts_module
from diffmoe.models.experts import Experts
from tests.helpers.networks import one_after_the_other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def make_experts(
    activation: str,
    dtype: torch.dtype,
    width: int = 16,
    hidden: int = 24,
    device: torch.device | None = None,
) -> Experts:
    experts = Experts(4, width, hidden, activation)
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return experts.to(device, dtype)


class Loop(experts_module._GroupedLinear):
    """One product per expert, whatever the device could do."""

    def __init__(self, rows_ND: Tensor, counts_e: Tensor) -> None:
        super().__init__(rows_ND, counts_e)
        self.has_kernel = False


def rounding(dtype: torch.dtype) -> float:
    """A few roundings of sums of up to 24 terms of size 1: 16 units in the last place."""
    return 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("counts", [[5, 0, 3, 0], [0, 0, 0, 7], [6, 6, 6, 6], [0, 0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
# 20 and 12 are lengths that the grouped kernel refuses in bf16, inside and outside.
@pytest.mark.parametrize(("width", "hidden"), [(16, 24), (16, 20), (12, 16)])
def test_grouped_experts_equal_each_expert_on_its_rows(
    width: int,
    hidden: int,
    activation: str,
    dtype: torch.dtype,
    counts: list[int],
    device: torch.device,
):
    experts = make_experts(activation, dtype, width, hidden, device)
    exact = make_experts(activation, dtype, width, hidden, device).double()
    rows = torch.randn(sum(counts), width, dtype=dtype).to(device).requires_grad_()
    exact_rows = rows.detach().double().requires_grad_()
    weights = torch.randn(sum(counts), width, dtype=dtype).to(device)
    outputs = experts(rows, torch.tensor(counts, device=device))
    expected = one_after_the_other(exact, exact_rows, counts)
    (outputs * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(outputs, expected), (rows.grad, exact_rows.grad)]
    pairs += [(gradients(experts)[name], g) for name, g in gradients(exact).items()]
    for actual, wanted in pairs:
        assert actual.dtype == dtype
        scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
        torch.testing.assert_close(actual.double(), wanted, atol=rounding(dtype) * scale, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_batched_kernel_and_loop_agree(
    activation: str, dtype: torch.dtype, device: torch.device, monkeypatch
):
    rows_eND = torch.randn(4, 6, 16, dtype=dtype).to(device)
    weights_eND = torch.randn(4, 6, 16, dtype=dtype).to(device)
    counts = torch.full((4,), 6, device=device)
    told = {}
    for path in ("batched", "grouped", "loop"):
        experts = make_experts(activation, dtype, device=device)
        rows = rows_eND.clone().requires_grad_()
        if path == "loop":
            monkeypatch.setattr(experts_module, "_GroupedLinear", Loop)
        if path == "batched":
            outputs = experts(rows, None)
        else:
            outputs = experts(rows.flatten(0, 1), counts).view(4, 6, 16)
        (outputs * weights_eND).sum().backward()
        told[path] = [outputs.detach(), rows.grad, *gradients(experts).values()]
    for path in ("grouped", "loop"):
        for actual, wanted in zip(told[path], told["batched"], strict=True):
            scale = max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(actual, wanted, atol=rounding(dtype) * scale, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_experts_take_the_broadcast_gradient_of_a_plain_sum(
    activation: str, dtype: torch.dtype, device: torch.device
):
    # torch's grouped product refuses it; the gradient must be laid out before it gets there.
    experts = make_experts(activation, dtype, device=device)
    rows, counts = torch.randn(8, 16, dtype=dtype).to(device), torch.tensor([5, 0, 3, 0])
    experts(rows, counts.to(device)).sum().backward()
    for name, gradient in gradients(experts).items():
        assert gradient.isfinite().all(), name
        assert (gradient[[1, 3]] == 0).all(), name  # no rows, no gradient
