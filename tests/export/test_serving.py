"""An exported model under torch.compile and torch.export; of ONNX see test_program.py."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import diffmoe
from diffmoe.models.dit import DiT
from tests.helpers.models import exported
from tests.helpers.tiny import tiny_config

# aot_eager traces as inductor does, without a minute of compiling.
BACKEND = "aot_eager"


@pytest.fixture
def network(tmp_path: Path, compiler: None) -> DiT:
    config = tiny_config(model__in_channels=3, model__depth=2)
    return diffmoe.load(exported(tmp_path / "model", config), device="cpu")


class Prediction(nn.Module):
    def __init__(self, network: DiT) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.network(x, t, labels).prediction


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, 8, 8, generator=generator)
    return x, torch.rand(3, generator=generator), torch.tensor([0, 1, 2])


@pytest.mark.slow
@torch.no_grad()
def test_static_routing_compiles_into_one_graph(network):
    network.route_by("static")
    expected = network(*inputs()).prediction
    compiled = torch.compile(network, fullgraph=True, backend=BACKEND)  # a break would raise
    torch.testing.assert_close(compiled(*inputs()).prediction, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_per_token_breaks_the_graph_only_where_shapes_depend_on_data(network):
    expected = network(*inputs()).prediction
    explained = torch._dynamo.explain(network)(*inputs())
    reasons = {str(reason.reason).partition("\n")[0] for reason in explained.break_reasons}
    # How many pairs of token and expert there are (nonzero), and how many each expert has.
    assert explained.graph_break_count > 0
    assert reasons == {"Dynamic shape operator", "Data dependent operator"}
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=BACKEND)
    torch.testing.assert_close(compiled(*inputs()).prediction, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_static_routing_exports(network):
    network.route_by("static")
    program = torch.export.export(Prediction(network), inputs())
    expected = network(*inputs()).prediction
    torch.testing.assert_close(program.module()(*inputs()), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_static_routing_exports_with_any_number_of_images(network, tmp_path: Path):
    """Also after it was stored, with all that a network returns."""
    network.route_by("static")
    images = torch.export.Dim("images", min=1, max=512)
    program = torch.export.export(network, inputs(), dynamic_shapes=({0: images},) * 3)
    torch.export.save(program, tmp_path / "network.pt2")
    stored = torch.export.load(tmp_path / "network.pt2").module()
    for number in (1, 2, 3, 7, 16):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(number, 3, 8, 8, generator=generator)
        given = x, torch.rand(number, generator=generator), torch.arange(number) % 5
        expected = network(*given)
        for found in (program.module()(*given), stored(*given)):
            torch.testing.assert_close(found.prediction, expected.prediction, rtol=0, atol=1e-6)
            assert torch.equal(found.routing[0].selected_ES, expected.routing[0].selected_ES)
