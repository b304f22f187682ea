"""A reference gives the same figures however it is kept, and fits one extractor only."""

import numpy as np
import pytest
import torch

from diffmoe.errors import UserError
from diffmoe.evaluation.extractors import INCEPTION
from diffmoe.evaluation.image_sets import open_images
from diffmoe.evaluation.metrics import compute_metrics
from diffmoe.evaluation.references import (
    check_reference,
    compute_reference,
    load_reference,
    store_reference,
)
from diffmoe.evaluation.summary import summarize
from tests.helpers.pictures import NAME, extractor, pictures, write_samples


@pytest.fixture
def adm(tmp_path):
    file = tmp_path / "images.npz"
    np.savez(file, arr_0=pictures(60, seed=1))
    return file


def inception():
    """The stand-in, under Inception's name."""
    return extractor()._replace(name=INCEPTION, checksum="1" * 64)


def statistics(size: int, shift: float) -> dict[str, np.ndarray]:
    return {"mu": np.full(size, shift), "sigma": np.eye(size)}


def test_stored_statistics_give_the_figures_of_the_images(tmp_path, adm):
    computed = compute_reference(adm, extractor())
    store_reference(tmp_path / "ref.npz", computed)
    stored = load_reference(tmp_path / "ref.npz", extractor())
    samples = summarize(open_images(write_samples(tmp_path / "s", pictures(40))), extractor())
    ours = compute_metrics(samples, stored, extractor())
    assert ours == compute_metrics(samples, computed, extractor())
    assert ours == compute_metrics(samples, load_reference(adm, extractor()), extractor())
    metrics = ("FD", "sFD", "IS", "IS_spread", "KID", "KID_spread", "precision", "recall")
    assert set(ours.values) == {f"{metric}-{NAME}" for metric in metrics}
    assert ours.warnings == []
    assert stored.about["moments"] == "stored by tools/evaluate.py reference, of 60 images"
    assert stored.about["source"]["path"] == str(adm)
    assert stored.about["image_shape"] == [8, 8, 3]


def test_the_same_images_are_at_distance_nought(adm):
    own = compute_metrics(
        summarize(open_images(adm), extractor()), compute_reference(adm, extractor()), extractor()
    )
    assert own.values[f"FD-{NAME}"] == pytest.approx(0, abs=1e-6)
    assert own.values[f"precision-{NAME}"] == 1
    assert own.values[f"recall-{NAME}"] == 1


@pytest.mark.parametrize("change", ["name", "checksum"])
def test_statistics_of_another_extractor_are_refused(tmp_path, adm, change):
    store_reference(tmp_path / "ref.npz", compute_reference(adm, extractor()))
    other = extractor()._replace(**{change: "other"})
    with pytest.raises(UserError, match=f"statistics of the extractor {NAME} .*not of .*other"):
        load_reference(tmp_path / "ref.npz", other)
    with pytest.raises(UserError, match=r"not of .*other"):
        check_reference(tmp_path / "ref.npz", other)


def test_adms_stored_statistics_are_used_for_inception_and_said(tmp_path):
    file = tmp_path / "adm.npz"
    spatial = {f"{k}_s": v for k, v in statistics(3, 7).items()}
    np.savez(file, arr_0=pictures(30), **statistics(6, 5), **spatial)
    stored = load_reference(file, inception())
    assert stored.pooled.mean.tolist() == [5] * 6
    assert stored.spatial.mean.tolist() == [7] * 3
    assert stored.pooled.number is None
    assert "stored in it (mu, sigma, mu_s, sigma_s)" in stored.about["moments"]
    assert stored.about["features"] == "of 30 images, its arr_0"
    assert torch.allclose(stored.features, extractor()(torch.from_numpy(pictures(30))).pooled)
    # Another extractor's moments come from the images.
    other = load_reference(file, extractor())
    assert other.about["moments"] == "computed from its images"
    assert other.pooled.number == 30
    assert other.pooled.mean[0] > 50
    np.savez(file, **statistics(6, 5))
    alone = load_reference(file, inception())
    assert alone.features is None
    with pytest.raises(UserError, match=r"no images \(arr_0\), only Inception's mu and sigma"):
        load_reference(file, extractor())
    with pytest.raises(UserError, match="only Inception's mu and sigma"):
        check_reference(file, extractor())
    samples = summarize(open_images(write_samples(tmp_path / "s", pictures(40))), inception())
    assert set(compute_metrics(samples, alone, inception()).values) == {
        f"FID-{INCEPTION}",
        f"IS-{INCEPTION}",
        f"IS_spread-{INCEPTION}",
    }


def test_damaged_statistics_are_refused(tmp_path, adm):
    file = tmp_path / "ref.npz"
    store_reference(file, compute_reference(adm, extractor()))
    arrays = dict(np.load(file))
    np.savez(file, **arrays | {"sigma": arrays["sigma"][:2]})
    with pytest.raises(UserError, match=r"ref\.npz is damaged .*make it again"):
        load_reference(file, extractor())
    with pytest.raises(UserError, match=r"must end in \.npz"):
        store_reference(tmp_path / "ref", compute_reference(adm, extractor()))


def test_few_images_other_sizes_and_duplicates_are_told(tmp_path, adm):
    images = pictures(4, size=9)
    images = np.concatenate([images, images[:1]])
    samples = summarize(open_images(write_samples(tmp_path / "s", images)), extractor())
    found = compute_metrics(samples, compute_reference(adm, extractor()), extractor())
    few, size, twice = found.warnings
    assert few.startswith("samples: 5 images for 6 features: the covariance is singular")
    assert size == "samples are (9, 9, 3), the reference's images (8, 8, 3)"
    assert twice == "1 of 5 samples equal an earlier one"


def test_distance_grows_with_noise(tmp_path, adm):
    reference, distances = compute_reference(adm, extractor()), []
    clean = pictures(60, seed=1).astype(float)
    for level in (0, 10, 20, 40):
        noise = np.random.default_rng(0).normal(size=clean.shape) * level
        np.savez(tmp_path / "n.npz", arr_0=np.clip(clean + noise, 0, 255).astype(np.uint8))
        samples = summarize(open_images(tmp_path / "n.npz"), extractor())
        distances.append(compute_metrics(samples, reference, extractor()).values[f"FD-{NAME}"])
    assert distances == sorted(distances)
    assert distances[0] < 1 < distances[1]
