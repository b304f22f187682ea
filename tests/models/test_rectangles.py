"""model.input_size=[height, width]: positions, patches, and what says that it is no square."""

import pytest
import torch
from torch.nn import functional as F

from diffmoe.errors import UserError
from diffmoe.models.blocks import grid_positions, modulate, rotary_angles
from diffmoe.models.dit import DiT
from diffmoe.planning.layouts import Layout
from tests.helpers.networks import network_of
from tests.helpers.tiny import refusal, tiny_config

WIDE = {"model__input_size": [4, 12]}


def test_a_token_has_the_position_of_the_same_place_in_a_square():
    square = grid_positions(16, (6, 6)).view(6, 6, 16)
    assert torch.equal(grid_positions(16, (2, 6)).view(2, 6, 16), square[:2])
    assert torch.equal(grid_positions(16, (6, 2)).view(6, 2, 16), square[:, :2])
    angles = rotary_angles((6, 6), 8).view(2, 6, 6, 4)
    assert torch.equal(rotary_angles((2, 6), 8).view(2, 2, 6, 4), angles[:, :2])
    assert torch.equal(rotary_angles((6, 2), 8).view(2, 6, 2, 4), angles[:, :, :2])


def test_angles_made_for_a_smaller_grid_are_spread_over_its_extent():
    made = rotary_angles((6, 4), 8)
    assert torch.equal(rotary_angles((6, 4), 8, (6, 4)), made)
    found = rotary_angles((12, 12), 8, made_for=(6, 4)).view(2, 12, 12, 4)
    # Each second row and each third column lie where a token of the smaller grid does.
    torch.testing.assert_close(found[:, ::2, ::3], made.view(2, 6, 4, 4))
    # The corner: 11/12 of the way over 6 and over 4 tokens.
    y, x, slow = 5.5, 11 / 3, 100.0**-1
    angles = torch.tensor([y, y * slow, x, x * slow])
    torch.testing.assert_close(found[:, -1, -1], torch.stack([angles.cos(), angles.sin()]))


def test_a_grid_for_rotary_angles_needs_these():
    told = refusal("model.rope_grid=[4, 4]")
    assert "model.rope_grid=[4, 4] belongs to model.rope=true" in told
    assert "model.rope_grid" in refusal("model.rope=true", "model.rope_grid=[0, 4]")


@torch.no_grad()
def test_each_patch_is_read_and_written_at_its_place():
    """With blocks that add nothing, each patch of the prediction is a function of its own patch."""
    config = tiny_config(**WIDE, model__in_channels=3)
    network = DiT(config.model, config.moe)  # blocks begin by adding nothing
    for parameter in (*network.final.parameters(), *network.final_adaln.parameters()):
        parameter.normal_()
    x, t, labels = torch.randn(2, 3, 4, 12), torch.rand(2), torch.tensor([1, 4])
    found = network(x, t, labels).prediction
    assert found.shape == x.shape
    vector = network.timestep_embed(t) + network.label_embed(labels)
    shift, scale = network.final_adaln(F.silu(vector)).chunk(2, dim=-1)
    weight, bias = network.patch_embed.weight.flatten(1), network.patch_embed.bias
    for row in range(2):
        for column in range(6):
            place = (..., slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
            token = x[place].flatten(1) @ weight.t() + bias + network.positions[row * 6 + column]
            made = network.final(modulate(network.final_norm(token[:, None]), shift, scale))
            expected = made.view(2, 2, 2, 3).permute(0, 3, 1, 2)
            torch.testing.assert_close(found[place], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rope", [False, True])
def test_height_and_width_are_not_mixed_up(rope: bool):
    """An image on its side is another image, and rotary positions tell rows from columns."""
    changes = {"model__rope": rope, "model__in_channels": 3}
    wide = network_of(tiny_config(model__input_size=[4, 12], **changes)).eval()
    high = network_of(tiny_config(model__input_size=[12, 4], **changes)).eval()
    x, t, labels = torch.randn(2, 3, 4, 12), torch.rand(2), torch.tensor([1, 4])
    one = wide(x, t, labels).prediction
    other = high(x.transpose(2, 3), t, labels).prediction.transpose(2, 3)
    assert one.isfinite().all()
    assert (one - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"the network takes \(B, 3, 4, 12\)"):
        wide(x.transpose(2, 3), t, labels)


def test_equal_sides_are_a_square():
    """So that a run's configuration does not depend on how it was written."""
    assert tiny_config(model__input_size=[8, 8]) == tiny_config(model__input_size=8)
    assert tiny_config(**WIDE).model.latent_shape == (2, 4, 12)
    assert Layout(tiny_config(**WIDE), 1, 1).tokens_per_sample == 12


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ("[4,5]", "model.input_size=[4, 5] is not divisible by model.patch_size=4; choose 1"),
        ("[8,12,4]", "[8, 12, 4] is neither a positive whole number nor [height, width]"),
        ("[8,0]", "[8, 0] is neither a positive whole number nor [height, width]"),
        ("8.5", "8.5 is neither a positive whole number nor [height, width]"),
        ("[4000,8000]", "makes 2,000,000 tokens; at most 262,144 are taken"),
    ],
)
def test_other_sizes_are_refused(size: str, told: str):
    assert told in refusal(f"model.input_size={size}")


def test_other_projects_formats_have_squares(tmp_path):
    from diffmoe.conversion.foreign import write_foreign
    from tests.helpers.models import source_of

    with pytest.raises(UserError, match="draws rectangles, release has squares; choose --to diff"):
        write_foreign(source_of(tiny_config(**WIDE)), tmp_path / "model.pt", "release")
