"""What latents are: one record of the data, a checkpoint and an exported model."""

import pytest

from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from diffmoe.latent_spec import LatentSpec
from tests.helpers.shards import FIELDS


def test_a_manifest_and_what_a_checkpoint_keeps_of_it_give_the_same():
    manifest = Manifest(**{**FIELDS, "scale": 0.5, "shards": []})
    kept = manifest.model_dump(mode="json", exclude={"shards", "location"})
    spec = LatentSpec.from_manifest(kept, "run.json")
    assert spec == manifest.latent_spec
    assert (spec.shape, spec.scale, spec.source) == (manifest.shape, 0.5, manifest.source)


def test_fields_that_a_file_of_before_does_not_have_keep_their_defaults():
    spec = LatentSpec.from_manifest({"shape": [1, 8, 8], "autoencoder": "identity"}, "run.json")
    assert spec.pixel_range == (-1, 1)
    assert spec.makes_gray
    assert not spec.model_copy(update={"autoencoder": "some/vae"}).makes_gray
    assert not spec.model_copy(update={"shape": (3, 8, 8)}).makes_gray


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, "latents is not an object"),
        ({}, "latents.shape: Field required"),
        ({"shape": [2, 8, 8], "scale": [1.0]}, "scale has 1 numbers for 2 channels"),
        ({"shape": [2, 8, 8], "shift": float("nan")}, "latents.shift"),
    ],
)
def test_damage_is_named_with_its_file(fields, message: str):
    with pytest.raises(UserError, match=rf"run\.json: .*{message}"):
        LatentSpec.from_manifest(fields, "run.json")
