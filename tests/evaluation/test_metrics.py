"""The metrics on given features, against closed forms, brute force and other implementations."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffmoe.errors import UserError
from diffmoe.evaluation import kid as kernel_distance_module
from diffmoe.evaluation import precision_recall
from diffmoe.evaluation.fid import frechet_distance, too_few
from diffmoe.evaluation.inception_score import InceptionScore
from diffmoe.evaluation.kid import kernel_distance, unbiased_mmd
from diffmoe.evaluation.moments import Gaussian, Moments
from diffmoe.evaluation.precision_recall import precision_and_recall
from diffmoe.seeding import keyed_generator


def draw(number: int, size: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0):
    generator = keyed_generator("evaluation test", seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    return (
        torch.randn(number, size, generator=generator, dtype=torch.float64) @ mixing * scale + shift
    )


def gaussian_of(features: torch.Tensor, batch: int = 7) -> Gaussian:
    moments = Moments()
    for part in features.split(batch):
        moments.add(part)
    return moments.gaussian()


def test_streamed_moments_are_numpys_even_far_from_the_origin():
    features = draw(100, 6) + 1e6
    found = gaussian_of(features)
    assert found.number == 100
    assert np.allclose(found.mean, features.numpy().mean(0), rtol=1e-14)
    expected = np.cov(features.numpy() - 1e6, rowvar=False)
    # x + 1e6 itself keeps only 1e-10 of x.
    assert np.allclose(found.covariance, expected, rtol=1e-8, atol=1e-9)


def test_one_image_has_no_covariance():
    with pytest.raises(UserError, match=r"1 image\(s\) have no covariance"):
        gaussian_of(draw(1, 3))


def test_frechet_distance_of_analytic_gaussians():
    means = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 2.0, 2.0])
    spreads = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5])
    # In any common basis: sum of (m_a - m_b)^2 + (s_a - s_b)^2.
    basis = torch.linalg.qr(draw(3, 3))[0]
    a, b = (
        Gaussian(basis @ m.double(), (basis * s.double() ** 2) @ basis.T, None)
        for m, s in zip(means, spreads, strict=True)
    )
    expected = 1 + 4 + 1 + 2.5**2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_is_that_of_scipys_matrix_root():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    a, b = gaussian_of(draw(400, 64)), gaussian_of(draw(300, 64, seed=1, scale=1.3, shift=0.2))
    root = scipy_linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + (
        a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root)
    )
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_fewer_images_than_features_are_told_and_need_no_offset():
    few, many = gaussian_of(draw(10, 32)), gaussian_of(draw(200, 32, seed=1))
    assert np.linalg.matrix_rank(few.covariance.numpy()) == 9
    told = too_few("samples", few)
    assert told.startswith("samples: 10 images for 32 features: the covariance is singular")
    assert too_few("samples", many) is None
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, many) == pytest.approx(frechet_distance(many, few), rel=1e-6)


@pytest.mark.parametrize("broken", ["size", "nan"])
def test_moments_that_do_not_fit_are_refused(broken):
    a = gaussian_of(draw(9, 4))
    b = gaussian_of(draw(9, 5)) if broken == "size" else a._replace(mean=a.mean / 0 * 0)
    with pytest.raises(UserError, match="of 4 and of 5" if broken == "size" else "not finite"):
        frechet_distance(a, b)


def brute_mmd(a: np.ndarray, b: np.ndarray) -> float:
    def k(x, y):
        return (x @ y / len(x) + 1) ** 3

    n = len(a)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    own = sum(k(a[i], a[j]) + k(b[i], b[j]) for i, j in pairs if i != j) / (n * (n - 1))
    return own - 2 * sum(k(a[i], b[j]) for i, j in pairs) / n**2


def test_kernel_distance_by_pairs():
    a, b = draw(12, 5), draw(12, 5, seed=1, shift=0.3)
    expected = brute_mmd(a.numpy(), b.numpy())
    assert float(unbiased_mmd(a, b)) == pytest.approx(expected, rel=1e-10)
    whole = kernel_distance(a, b, subsets=3)  # every subset is the whole set
    assert whole.mean == pytest.approx(expected, rel=1e-10)
    assert whole.spread == pytest.approx(0, abs=1e-12)
    assert whole.subset_size == 12


def test_kernel_distance_is_torchmetrics_own():
    from torchmetrics.image import kid

    a, b = draw(50, 20), draw(50, 20, seed=1, scale=1.2)
    assert float(unbiased_mmd(a, b)) == pytest.approx(float(kid.poly_mmd(a, b)), rel=1e-9)


@pytest.mark.slow
def test_kernel_distance_is_unbiased_and_repeats():
    a, b = torch.randn(2, 3000, 8, generator=keyed_generator("kid"), dtype=torch.float64)
    same = kernel_distance(a, b, subset_size=300)
    assert abs(same.mean) < 3 * same.spread / 3  # about 10 independent subsets in 3,000
    assert same == kernel_distance(a, b, subset_size=300)
    assert same != kernel_distance(a, b, subset_size=300, seed=1)
    assert kernel_distance(a, b + 0.5, subset_size=300).mean > 0.5


@pytest.mark.parametrize(("n", "m", "size"), [(200, 150, 60), (40, 300, 1000), (400, 900, 20)])
def test_kernel_matrices_made_once_give_what_each_subset_gives(monkeypatch, n, m, size):
    monkeypatch.setattr(kernel_distance_module, "_BLOCK", 7_000)  # several blocks of rows
    a, b = draw(n, 24), draw(m, 24, seed=1, scale=1.3, shift=0.2)
    found = kernel_distance(a, b, subsets=20, subset_size=size, seed=3)
    values = [float(unbiased_mmd(*some)) for some in kid_subsets(a, b, 20, size, seed=3)]
    assert found.mean == pytest.approx(np.mean(values), rel=1e-10)
    assert found.spread == pytest.approx(np.std(values), rel=1e-8, abs=1e-12)


def kid_subsets(a, b, subsets: int, size: int, seed: int):
    """The draws as they have always been."""
    generator, size = keyed_generator(seed, "kid"), min(size, len(a), len(b))
    for _ in range(subsets):
        yield tuple(x[torch.randperm(len(x), generator=generator)[:size]] for x in (a, b))


def test_every_kernel_value_is_computed_once():
    n, width, subsets = 600, 16, 100
    a, b = torch.randn(2, n, width, generator=keyed_generator("kid"), dtype=torch.float64)
    with FlopCounterMode(display=False) as counted:
        kernel_distance(a, b, subsets, subset_size=300)
    # x.y of all pairs, and their sums over the subsets.
    assert counted.get_total_flops() <= 1.01 * 2 * (width + subsets) * 3 * n**2


def brute_precision(samples: np.ndarray, reference: np.ndarray, k: int) -> float:
    """The definition in ADM's words: a row's distances sorted, itself first, then the k-th."""
    between = np.linalg.norm(reference[:, None] - reference[None], axis=2)
    radii = np.sort(between, axis=1)[:, k]
    distances = np.linalg.norm(samples[:, None] - reference[None], axis=2)
    return float((distances <= radii).any(1).mean())


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_definition(monkeypatch, k):
    monkeypatch.setattr(precision_recall, "_BLOCK", 500)  # several blocks, the last one smaller
    samples, reference = draw(61, 3), draw(83, 3, seed=1, shift=0.5)
    found = precision_and_recall(samples, reference, k)
    expected = brute_precision(samples.numpy(), reference.numpy(), k)
    assert 0.1 < expected < 0.9
    assert found == (expected, brute_precision(reference.numpy(), samples.numpy(), k))


def test_precision_and_recall_tell_quality_from_coverage():
    reference = draw(300, 4)
    assert precision_and_recall(reference, reference) == (1, 1)
    narrow = precision_and_recall(draw(300, 4, scale=0.1), reference)
    assert narrow[0] > 0.98
    assert narrow[1] < 0.1
    assert precision_and_recall(reference + 100, reference) == (0, 0)


def test_distances_are_never_held_all_at_once(monkeypatch):
    shapes, blocks = [], precision_recall._blocks

    def watched(rows, columns):
        for start, squared in blocks(rows, columns):
            shapes.append(squared.numel())
            yield start, squared

    monkeypatch.setattr(precision_recall, "_blocks", watched)
    monkeypatch.setattr(precision_recall, "_BLOCK", 10_000)
    precision_and_recall(draw(400, 3), draw(500, 3, seed=1))
    assert max(shapes) <= 10_000
    assert sum(shapes) == 400 * 500 * 2 + 400**2 + 500**2


def test_three_images_have_no_third_neighbor():
    with pytest.raises(UserError, match="3 samples; give at least 4"):
        precision_and_recall(draw(3, 2), draw(9, 2))


def test_inception_score_of_sure_and_of_clueless_predictions():
    sure, clueless = InceptionScore(), InceptionScore()
    sure.add(torch.eye(10).repeat(3, 1))
    clueless.add(torch.full((30, 10), 0.1))
    assert sure.read() == pytest.approx((10, 0))
    assert clueless.read() == pytest.approx((1, 0))


def test_inception_score_is_adms_over_any_batches():
    p = torch.softmax(draw(25, 7, scale=3), 1)
    score = InceptionScore(split_size=10)
    for part in p.split(4):
        score.add(part)
    expected = []
    for part in (p[:10], p[10:20], p[20:]):  # the last split is shorter and counts as much
        kl = part * (part.log() - part.mean(0, keepdim=True).log())
        expected.append(float(kl.sum(1).mean().exp()))
    assert score.read() == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-12)
