"""Figures of sets of features: closed forms of Gaussians, invariances, and torchmetrics where it is."""

import math

import pytest
import torch

from autoencoder.similarity import WINDOW, decibels, ssim
from ldm.metrics.kernels import cmmd, kid, unbiased_mmd
from ldm.metrics.manifolds import cover, nearest, radii
from ldm.metrics.moments import Moments, frechet_distance
from ldm.metrics.scores import clip_score, inception_score


def draw(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exact(mean: torch.Tensor, covariance: torch.Tensor) -> Moments:
    return Moments(101, mean.double(), covariance.double() * 100)


def test_moments_do_not_depend_on_how_they_came():
    """Batches of any size, in any order, far from the origin: as torch has them of all together."""
    x = 1e4 + draw(97, 5)
    whole = Moments.of(x)
    torch.testing.assert_close(whole.mean, x.mean(0))
    torch.testing.assert_close(whole.covariance, x.T.cov(), rtol=1e-9, atol=0)
    for size in (1, 10, 96):
        first, *others = (Moments.of(part) for part in x[torch.randperm(97)].split(size))
        merged = sum(others, first)
        assert merged.count == 97
        torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="1 pictures have no covariance: give 2"):
        _ = Moments.of(x[:1]).covariance


def test_frechet_distance_of_gaussians():
    """Covariances that commute have it in closed form: |m|^2 and the squares of the roots' difference."""
    turn = torch.linalg.qr(draw(6, 6)).Q
    a, b = torch.tensor([9.0, 4, 1, 1, 0, 0]).double(), torch.tensor([4.0, 4, 0, 9, 0, 1]).double()
    shift = draw(1, 6, 1)[0]
    made = [exact(mean, (turn * values) @ turn.T) for mean, values in ((0 * shift, a), (shift, b))]
    want = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(*made) == pytest.approx(want.item(), rel=1e-10)
    # covariances that do not commute: 2x2, tr (A B)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))
    A, B = torch.tensor([[2.0, 1], [1, 3]]).double(), torch.tensor([[5.0, -1], [-1, 1]]).double()
    cross = math.sqrt((A @ B).trace() + 2 * math.sqrt(A.det() * B.det()))
    zero = torch.zeros(2)
    assert frechet_distance(exact(zero, A), exact(zero, B)) == pytest.approx(11 - 2 * cross, rel=1e-12)


def test_frechet_distance_of_few_samples():
    """Covariances of less than full rank: 0 of a set and itself, the same both ways, in any units."""
    a, b = Moments.of(draw(20, 64)), Moments.of(draw(30, 64, 1) * 2)
    assert frechet_distance(a, a) < 1e-9 * a.covariance.trace()
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    large = [Moments(each.count, each.mean * 1e6, each.scatter * 1e12) for each in (a, b)]
    assert frechet_distance(*large) == pytest.approx(1e12 * frechet_distance(a, b), rel=1e-9)


def test_kernel_distances():
    """Both estimators by their sums; no bias; of one set CMMD is 0; subsets are drawn from their seed."""
    a, b = draw(7, 3), draw(5, 3, 1) + 1
    kernel = lambda x, y: (x @ y / 3 + 1) ** 3
    within = [
        sum(kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / len(s) / (len(s) - 1)
        for s in (a, b)
    ]
    between = sum(kernel(x, y) for x in a for y in b) / 35
    assert unbiased_mmd(a, b) == pytest.approx((within[0] + within[1] - 2 * between).item(), rel=1e-12)
    unit = torch.eye(4).double()
    want = 1000 * (2 * (0.5 + 0.5 * math.exp(-2 / 200)) - 2 * math.exp(-2 / 200))
    assert cmmd(unit[:2] * 5, unit[2:]) == pytest.approx(want, rel=1e-9), "lengths do not count"
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)
    x, y, far = draw(400, 8), draw(300, 8, 1), draw(300, 8, 2) + 0.5
    alike = kid(x, y, subsets=40, size=100)
    assert abs(alike.mean) < 3 * alike.std / math.sqrt(40) + 0.05
    assert kid(x, far, subsets=10, size=100).mean > 1
    assert kid(x, far, subsets=3, size=100) == kid(x, far, subsets=3, size=100)
    assert kid(a, a[:1].repeat(7, 1)).std == 0, "small sets are taken whole, once"
    with pytest.raises(ValueError, match="1 and 5 pictures have no KID"):
        kid(a[:1], b)


def test_cover():
    """Points on a line, by hand; and what must hold of a set and itself, and of sets that lie apart."""
    line = torch.arange(10.0)[:, None]
    assert radii(line, 3).tolist() == [3, 2, 2, 2, 2, 2, 2, 2, 2, 3]
    assert nearest(line[:1] + 0.1, line, 2)[1].tolist() == [[0, 1]]
    fake = torch.tensor([[0.5], [4.5], [20.0], [12.5]])
    # balls of real ones with k = 3 end at 12; with k = 5: radii 5 4 3 3 3 3 3 3 4 5, so they end at 14
    got = cover(line, fake)
    assert got.precision == 0.5
    assert got.recall == 1.0
    # 0.5 lies in those of 0 to 3; 4.5 in those of 2 to 7 and, with radius 5, of 0 and 9, radius 4 of 1 and 8
    assert got.density == pytest.approx((4 + 10 + 0 + 1) / 5 / 4)
    assert got.coverage == 1.0
    x = draw(60, 4)
    same = cover(x, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert cover(x, x[torch.randperm(60)]) == same
    assert cover(x, x + 100) == (0, 0, 0, 0)
    narrow = cover(x, x[:1] + 0.01 * draw(60, 4, 1))
    assert narrow.precision == 1
    assert max(narrow.recall, narrow.coverage) < 0.2, "one place alone covers little"
    with pytest.raises(ValueError, match="5 pictures have no 5 neighbours: give 6"):
        cover(line[:5], line)


def test_scores():
    sure = torch.eye(5).repeat(4, 1)
    assert inception_score(sure, splits=4) == pytest.approx((5, 0), abs=1e-9), "as many as classes"
    assert inception_score(torch.full((20, 5), 0.2), splits=2) == pytest.approx((1, 0), abs=1e-9)
    with pytest.raises(ValueError, match="3 pictures do not make 10 splits"):
        inception_score(sure[:3])
    a = torch.tensor([[1.0, 0], [0, 2], [1, 0]])
    b = torch.tensor([[3.0, 4], [0, 1], [-1, 0]])
    assert clip_score(a, b).mean == pytest.approx((60 + 100 + 0) / 3)


@pytest.mark.slow
def test_torchmetrics_agrees():
    """On the same features, which its modules take in place of pictures' by a feature module of our own."""
    pytest.importorskip("torchmetrics", reason="needs torchmetrics, which only this test knows")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    class Flat(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1).float()

    real, fake = draw(200, 12), draw(150, 12, 1) * 1.3 + 0.2
    as_pictures = lambda x: x.view(-1, 3, 2, 2)
    fid = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2), normalize=False).double()
    whole = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=150, normalize=False)
    for theirs in (fid, whole):
        theirs.update(as_pictures(real[:150]), real=True)
        theirs.update(as_pictures(fake), real=False)
    ours = frechet_distance(Moments.of(real[:150]), Moments.of(fake))
    assert ours == pytest.approx(float(fid.compute()), rel=1e-4)
    assert kid(real[:150], fake).mean == pytest.approx(float(whole.compute()[0]), rel=1e-4)
    torch.manual_seed(0)
    score = InceptionScore(feature=Flat(), splits=1)
    score.update(as_pictures(fake))
    assert inception_score(fake.softmax(1), 1).mean == pytest.approx(float(score.compute()[0]), rel=1e-4)


@pytest.mark.slow
def test_torchmetrics_agrees_on_pictures():
    """PSNR, and SSIM where the whole window lies in the picture: it takes in edges, mirrored outwards."""
    pytest.importorskip("torchmetrics", reason="needs torchmetrics, which only this test knows")
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    image = torch.rand(3, 3, 40, 52) * 2 - 1
    other = (image + 0.1 * torch.randn(3, 3, 40, 52)).clamp(-1, 1)
    error = (image - other).square().mean().item()
    assert decibels(error) == pytest.approx(float(peak_signal_noise_ratio(image, other, 2.0)), rel=1e-6)
    whole = structural_similarity_index_measure(
        (image + 1) / 2, (other + 1) / 2, data_range=1.0, return_full_image=True
    )[1]
    inside = whole[..., WINDOW // 2 : -(WINDOW // 2), WINDOW // 2 : -(WINDOW // 2)]
    assert ssim(image, other).mean().item() == pytest.approx(inside.mean().item(), rel=1e-4)
