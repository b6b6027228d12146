"""The loss is the paper's for the four kinds of prediction, its weights finite, its timesteps even."""

import math
from collections import deque

import numpy as np
import pytest
import torch

from ldm.diffusion.objective import (
    WEIGHTS,
    LossHistory,
    Uncertainty,
    diffusion_loss,
    min_snr,
    p2,
    soft_min_snr,
    stratified_timesteps,
)
from ldm.diffusion.schedule import Level, NoiseSchedule, to_x0

SCHEDULE = NoiseSchedule.scaled_linear()
ZERO_SNR = SCHEDULE.zero_terminal_snr()
T_OF_BATCH = torch.tensor([0, 500, 999])


def batch():
    x0, noise = torch.randn(2, 3, 4, 5, 7)
    return x0, torch.randn(3, 6, 8), noise


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_a_perfect_model_has_no_loss(kind):
    """And what it predicts converts back to x0 where the schedule has any signal."""
    x0, context, noise = batch()

    def perfect(xt, t, context):
        level = SCHEDULE.at(t, like=xt)
        if kind == "flow":  # it sees a point of the straight line from data to noise
            s = level.sigma / (level.alpha + level.sigma)
            torch.testing.assert_close(xt, (1 - s) * x0 + s * noise)
            return noise - x0
        torch.testing.assert_close(xt, level.alpha * x0 + level.sigma * noise)
        prediction = {"eps": noise, "v": level.alpha * noise - level.sigma * x0, "x0": x0}[kind]
        torch.testing.assert_close(to_x0(prediction, xt, level, kind), x0, atol=2e-5, rtol=1e-4)
        return prediction

    loss = diffusion_loss(perfect, SCHEDULE, x0, context, kind, noise, T_OF_BATCH)
    assert loss.tolist() == [0, 0, 0]


def test_loss_is_a_mean_of_squares_for_each_sample():
    x0, context, noise = batch()
    off = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)

    def unet(xt, t, given):
        assert given is context
        assert t.dtype == torch.int64
        return noise + off

    loss = diffusion_loss(unet, SCHEDULE, x0, context, "eps", noise, T_OF_BATCH)
    torch.testing.assert_close(loss, torch.tensor([1.0, 4.0, 9.0]))
    weighed = diffusion_loss(unet, SCHEDULE, x0, context, "eps", noise, T_OF_BATCH, WEIGHTS["min_snr"])
    snr = (SCHEDULE.alpha / SCHEDULE.sigma)[T_OF_BATCH] ** 2
    torch.testing.assert_close(weighed, (loss * snr.clamp(max=5) / snr).float())


def test_loss_is_float32_whatever_the_model_computes_in():
    x0, context, noise = batch()
    loss = diffusion_loss(lambda xt, t, c: xt.bfloat16(), SCHEDULE, x0, context, "v", noise, T_OF_BATCH)
    assert loss.dtype == torch.float32


def test_eps_at_zero_snr_is_refused():
    x0, context, noise = batch()
    with pytest.raises(ValueError, match=r"zero terminal SNR.*v or x0"):
        diffusion_loss(lambda xt, t, c: xt, ZERO_SNR, x0, context, "eps", noise, T_OF_BATCH)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_weights_are_finite_and_positive_down_to_zero_snr(name, kind):
    t = torch.arange(1000)
    weight = WEIGHTS[name](ZERO_SNR.at(t, like=torch.zeros(1, 4, 5, 7)), kind)
    assert weight.shape == (1000, 1, 1, 1)
    assert weight.isfinite().all()
    assert (weight > 0).all()


def test_min_snr_is_the_papers_where_the_signal_is_strong():
    """For v and x0 SNR + 1 stands for SNR: the same above gamma, and not 0 below."""
    level = Level(0.0, SCHEDULE.alpha, SCHEDULE.sigma)
    snr = (level.alpha / level.sigma) ** 2
    torch.testing.assert_close(min_snr(level, "eps"), snr.clamp(max=5) / snr)
    torch.testing.assert_close(min_snr(level, "v"), (snr + 1).clamp(max=5) / (snr + 1))
    torch.testing.assert_close(min_snr(level, "x0", gamma=3.0), (snr + 1).clamp(max=3))
    torch.testing.assert_close(min_snr(level, "v") * (snr + 1), min_snr(level, "x0"))  # one loss, two ways


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "none"])
def test_weights_are_one_loss_in_three_ways(name):
    """An error in x0 weighs the same whether the model predicts v, x0 or the flow."""
    level = Level(0.0, SCHEDULE.alpha, SCHEDULE.sigma)
    snr, xt, off = (level.alpha / level.sigma) ** 2, torch.zeros(()), torch.ones(())
    v, x0, flow = (WEIGHTS[name](level, kind) for kind in ("v", "x0", "flow"))
    torch.testing.assert_close(v * (snr + 1), x0)
    for kind, weight in (("v", v), ("flow", flow)):  # what an error of 1 in the prediction does to x0
        torch.testing.assert_close(x0 * to_x0(off, xt, level, kind) ** 2, weight)


def test_soft_min_snr_and_p2_are_as_published():
    """For eps at every level; for x0 with SNR + 1 in the place of SNR."""
    level = Level(0.0, SCHEDULE.alpha, SCHEDULE.sigma)
    snr = (level.alpha / level.sigma) ** 2
    torch.testing.assert_close(soft_min_snr(level, "eps"), 4 / (snr + 4))
    torch.testing.assert_close(soft_min_snr(level, "x0", gamma=3.0), 3 * (snr + 1) / (snr + 1 + 3))
    torch.testing.assert_close(p2(level, "eps"), 1 / (1 + snr))
    torch.testing.assert_close(p2(level, "x0"), (snr + 1) / (1 + snr + 1))


def test_a_perturbation_is_seen_and_not_asked_for():
    x0, context, noise = batch()
    perturbation = torch.randn_like(noise)

    def unet(xt, t, context):
        level = SCHEDULE.at(t, like=xt)
        torch.testing.assert_close(xt, level.alpha * x0 + level.sigma * (noise + perturbation))
        return noise

    args = (SCHEDULE, x0, context, "eps", noise, T_OF_BATCH)
    assert diffusion_loss(unet, *args, perturbation=perturbation).tolist() == [0, 0, 0]


def test_an_area_weight_makes_a_weighted_mean():
    x0, context, noise = batch()
    area_weight = 1 + 9 * torch.rand(len(x0), 1, *x0.shape[2:])
    area_weight[0] = 7.0
    args = (lambda xt, t, context: 0.3 * xt, SCHEDULE, x0, context, "eps", noise, T_OF_BATCH)
    level = SCHEDULE.at(T_OF_BATCH, like=x0)
    error = (0.3 * (level.alpha * x0 + level.sigma * noise) - noise) ** 2
    means = [np.average(e.mean(0), weights=w[0]) for e, w in zip(error, area_weight, strict=True)]
    weighed = diffusion_loss(*args, area_weight=area_weight)
    assert weighed.tolist() == pytest.approx(means, rel=1e-6)
    assert weighed[0].item() == pytest.approx(diffusion_loss(*args)[0].item(), rel=1e-6)


def test_uncertainty_learns_the_mean_loss_of_each_timestep():
    uncertainty = Uncertainty(1000)
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=0.01)
    rng = torch.Generator().manual_seed(0)
    t = torch.arange(1000)
    assert torch.equal(uncertainty(t), torch.zeros(1000))
    mean = 0.05 + (t / 1000) ** 2
    for _ in range(500):
        drawn = torch.randint(1000, (256,), generator=rng)
        loss = mean[drawn] * (0.5 + torch.rand(256, generator=rng))
        optimizer.zero_grad()
        uncertainty.balance(loss, drawn).mean().backward()
        optimizer.step()
    assert ((uncertainty(t).exp() / mean).log().abs() < 0.25).float().mean() > 0.95


@pytest.mark.parametrize("count", [1, 3, 8, 1000, 1700])
@pytest.mark.parametrize("u", [0.0, 0.37, 1 - 2**-53])
@pytest.mark.parametrize("shift", [0.4, 1.0, 3.0])
def test_timesteps_are_on_the_schedule(count, u, shift):
    t = stratified_timesteps(count, 1000, u, shift)
    assert t.dtype == torch.int64
    assert t.shape == (count,)
    assert t.min() >= 0
    assert t.max() <= 999


@pytest.mark.parametrize("count", [1, 2, 8, 125])
def test_timesteps_are_one_in_each_stratum(count):
    t = stratified_timesteps(count, 1000, u=0.3712345)
    assert torch.bincount(t * count // 1000, minlength=count).tolist() == [1] * count


def test_logit_normal_timesteps_have_its_quantiles():
    t = stratified_timesteps(100_000, 1000, 0.5, density="logit_normal")
    for q in (0.02, 0.3, 0.5, 0.9):
        below = 0.5 * (1 + math.erf(math.log(q / (1 - q)) / math.sqrt(2)))
        assert (t < 1000 * q).double().mean() == pytest.approx(below, abs=2e-3)
    for u in (0.0, 1 - 2**-53):  # the quantiles of 0 and nearly 1
        assert 0 <= stratified_timesteps(1, 1000, u, 3.0, "logit_normal").item() <= 999


@pytest.mark.parametrize("shift", [0.4, 3.0])
def test_shifted_timesteps_are_those_of_esser(shift):
    """Where the even ones have a fraction q below t, the shifted ones have it below shift(t)."""
    t = stratified_timesteps(100_000, 1000, 0.5, shift)
    for q in (0.1, 0.5, 0.9):
        assert (t < 1000 * shift * q / (1 + (shift - 1) * q)).double().mean() == pytest.approx(q, abs=2e-3)


def test_timesteps_are_uniform_over_u():
    draws = torch.cat([stratified_timesteps(3, 10, (i + 0.5) / 1000) for i in range(1000)])
    assert torch.bincount(draws, minlength=10).tolist() == pytest.approx([300] * 10, abs=3)


def test_the_history_holds_the_last_ten_losses_of_each_timestep():
    """As ten-place queues would, also where a batch has a timestep many times; nan is no loss."""
    history, rng = LossHistory(7), torch.Generator().manual_seed(0)
    queues = [deque(maxlen=10) for _ in range(7)]
    for count in (1, 5, 40, 3, 200):
        t, loss = torch.randint(7, (count,), generator=rng), torch.rand(count, generator=rng)
        loss[2:3] = math.nan
        history.note(t, loss)
        for one, value in zip(t.tolist(), loss.tolist(), strict=True):
            if not math.isnan(value):
                queues[one].append(value)
        assert [sorted(row[row > 0].tolist()) for row in history.losses[:-1]] == list(map(sorted, queues))
    size = torch.tensor([np.mean(np.square(queue)) ** 0.5 for queue in queues], dtype=torch.float64)
    torch.testing.assert_close(history.probabilities(), 0.999 * size / size.sum() + 0.001 / 7)


def test_importance_changes_how_often_and_not_the_mean():
    history, t = LossHistory(50), torch.arange(50)
    quantiles = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    chosen, weight = history.choose(quantiles)
    assert torch.bincount(chosen).tolist() == [400] * 50  # even while there is nothing to go by
    assert weight.tolist() == [1] * 20_000
    for _ in range(10):
        history.note(t, 1.0 / (1 + t))
    chosen, weight = history.choose(quantiles)
    often = torch.bincount(chosen, minlength=50).double()
    torch.testing.assert_close(often / 20_000, history.probabilities(), atol=1e-4, rtol=0)
    assert often[0] > 10 * often[20]
    loss = torch.sin(t / 10.0)
    assert (weight * loss[chosen]).mean().item() == pytest.approx(loss.mean().item(), abs=2e-3)
