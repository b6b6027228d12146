"""Laws of the tables: each checks itself, has its order of accuracy, and can start at zero SNR."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from ldm.diffusion.noise import step_noise
from ldm.diffusion.sample import sample, trajectory
from ldm.diffusion.schedule import Level, NoiseSchedule, Timesteps, to_x0
from ldm.diffusion.scheduler import Scheduler
from ldm.diffusion.solvers import SOLVERS, Tableau, consistency, ddim, dpmpp_2m, heun, plms, unipc

DETERMINISTIC = {
    name: solver for name, solver in SOLVERS.items() if name not in ("ddpm", "euler_a", "dpmpp_2m_sde", "lcm")
}
NO_NOISE = step_noise([], (1,))


def even_steps(count: int, first: float = -2.5, last: float = 2.0) -> Timesteps:
    """Evenly spaced in log_snr, with an end that is not the data: where orders show."""
    log_snr = torch.linspace(first, last, count + 1, dtype=torch.float64)
    return Timesteps(-log_snr[:-1], torch.sigmoid(2 * log_snr).sqrt(), torch.sigmoid(-2 * log_snr).sqrt())


def gaussian(xt: Tensor, level: Level, std: float = 0.5, mean: float = 0.0) -> Tensor:
    """E[x0 | xt] for x0 ~ N(mean, std**2): the model that has learned such data."""
    gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
    return mean + gain * (xt - level.alpha * mean)


def orders(solver, extra: int = 0) -> float:
    """The order shown by halving the steps, at log_snr = 2, with that many steps to go on."""

    def error(count: int) -> float:
        """For x0 ~ N(0, s**2) the ODE is solved by hand: x / sqrt(alpha**2 s**2 + sigma**2) never changes."""
        steps = even_steps(count + extra, last=-2.5 + 4.5 * (count + extra) / count)
        std = (steps.alpha**2 * 0.25 + steps.sigma**2).sqrt()
        states = [step.xt for step in trajectory(gaussian, std[:1], solver(steps), NO_NOISE)]
        return abs(states[-1 - extra] - std[count]).item()

    return math.log2(error(80) / error(160))


@pytest.mark.parametrize(
    ("solver", "order"),
    [(ddim, 1), (dpmpp_2m, 2), (heun, 2), (plms, 2), (partial(unipc, order=1), 2), (unipc, 2)],
)
def test_order_of_accuracy(solver, order):
    assert orders(solver) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("p", "order"), [(1, 2), (2, 3), (3, 4)])
def test_unipc_is_of_higher_order_before_its_last_steps(p, order):
    """UniPC-p is of order p + 1 while it is under way; its last step is of order 1."""
    assert orders(partial(unipc, order=p), extra=p) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_steady_answer_is_followed_exactly(name, count, zero_snr):
    """The law of the constructor, seen from outside: noise + x0 -> x0, whatever the solver."""
    schedule = NoiseSchedule.scaled_linear()
    steps = (schedule.zero_terminal_snr() if zero_snr else schedule).timesteps(count)
    x0, noise = torch.randn(2, 3, 4, 5, 7, dtype=torch.float64)
    xt = steps.alpha[0] * x0 + steps.sigma[0] * noise
    end = sample(lambda xt, level: x0, xt, SOLVERS[name](steps), step_noise([1, 2, 3], (4, 5, 7)))
    torch.testing.assert_close(end, x0)


@pytest.mark.parametrize("part", ["a", "b", "c"])
def test_a_wrong_table_does_not_come_to_be(part):
    tableau = dpmpp_2m(even_steps(5))
    wrong = getattr(tableau, part).clone()
    wrong[2] += 1e-3 if part != "c" else 0.1
    with pytest.raises(AssertionError, match="does not arrive at its"):
        dataclasses.replace(tableau, **{part: wrong})


@pytest.mark.parametrize(
    "solver",
    [
        ddim,
        partial(ddim, eta=0.5),
        partial(ddim, eta=1.0),
        partial(unipc, order=1),
        consistency,
    ],
)
def test_zero_snr_is_a_limit(solver):
    """The table at alpha = 0 is where the tables go as alpha does; log_snr goes slowly, so take it far."""

    def table(first_alpha: float) -> Tableau:
        steps = NoiseSchedule.scaled_linear().zero_terminal_snr().timesteps(6)
        alpha, sigma = steps.alpha.clone(), steps.sigma.clone()
        alpha[0], sigma[0] = first_alpha, math.sqrt(1 - first_alpha**2)
        return solver(Timesteps(steps.t, alpha, sigma))

    exact, near = table(0.0), table(1e-300)
    for name in ("a", "b", "c"):
        assert getattr(exact, name).isfinite().all()
        torch.testing.assert_close(getattr(near, name), getattr(exact, name), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize(("solver", "corrected"), [(dpmpp_2m, False), (unipc, True)])
def test_the_second_step_from_zero_snr_is_of_second_order(solver, corrected):
    """For answers linear in rho = alpha / sigma, as near alpha = 0: x / sigma grows by their integral."""

    def error(h: float, rho: float = 0.3) -> float:
        ratio = torch.tensor([0.0, *(rho * math.exp(h * k) for k in range(4))], dtype=torch.float64)
        steps = Timesteps(torch.arange(4.0), ratio / (1 + ratio**2).sqrt(), (1 + ratio**2).rsqrt())
        line = lambda xt, level: torch.full_like(xt, level.alpha / level.sigma)
        runs = trajectory(line, torch.zeros(1, dtype=torch.float64), solver(steps), NO_NOISE)
        second = [step.xt for step in runs][1]
        first = rho**2 / 2 if corrected else 0.0  # a predictor takes the first answer, 0, for all of its step
        return abs(second / steps.sigma[2] - first - (ratio[2] ** 2 - ratio[1] ** 2) / 2).item()

    assert math.log2(error(0.2) / error(0.1)) == pytest.approx(3, abs=0.3)  # of one step: order 2 of a run


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_zero_snr_ends_at_the_data(name):
    """From pure noise to Gaussian data with a mean, which a first step from alpha = 0 must find by itself."""
    steps = NoiseSchedule.scaled_linear().zero_terminal_snr().timesteps(50)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    end = sample(partial(gaussian, mean=3.0), noise, SOLVERS[name](steps), NO_NOISE)
    torch.testing.assert_close(end, 3 + 0.5 * noise, atol=0.08, rtol=0)


@pytest.mark.parametrize("name", ["ddpm", "euler_a", "dpmpp_2m_sde"])
def test_noise_keeps_the_distribution(name):
    steps = NoiseSchedule.scaled_linear().timesteps(200)
    noise = step_noise([1], (20000,))
    end = sample(partial(gaussian, mean=3.0), torch.randn(1, 20000), SOLVERS[name](steps), noise)
    assert end.mean().item() == pytest.approx(3, abs=0.02)
    assert end.std().item() == pytest.approx(0.5, abs=0.03)
    assert not torch.equal(end, sample(gaussian, torch.zeros(1, 20000), SOLVERS[name](steps), noise))


def end_of_the_ode(xt: Tensor, level: Level, std: float = 0.5, mean: float = 3.0) -> Tensor:
    """The consistency function of x0 ~ N(mean, std**2): where the probability flow ODE takes xt."""
    return mean + (xt - level.alpha * mean) * std / (level.alpha**2 * std**2 + level.sigma**2) ** 0.5


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_a_consistency_model_needs_a_step_and_more_keep_the_distribution(count):
    """One ends where a thousand of Heun's do; each further one goes back and ends among the data again."""
    noise = torch.randn(1, 20000, dtype=torch.float64)
    steps = Scheduler.default().timesteps(count, "lcm")
    end = sample(end_of_the_ode, noise, consistency(steps), step_noise([1], (20000,)))
    assert end.mean().item() == pytest.approx(3, abs=0.02)
    assert end.std().item() == pytest.approx(0.5, abs=0.02)
    if count == 1:
        many = NoiseSchedule.scaled_linear().zero_terminal_snr().timesteps(1000)
        ode = sample(partial(gaussian, mean=3.0), noise[:, :9], heun(many), NO_NOISE)
        torch.testing.assert_close(end[:, :9], ode, atol=0.01, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_an_image_depends_on_its_own_noise(name):
    """Alone, in a batch of three and in another order: the same bits, as this model works point by point."""
    tableau, shape = Scheduler.default().tableau(5, name), (4, 5, 7)

    def run(seeds: list[int]) -> Tensor:
        xt = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        return sample(
            lambda xt, level: to_x0(xt.sin(), xt, level, "v"), xt, tableau, step_noise(seeds, shape)
        )

    together = run([3, 4, 5])
    assert torch.equal(run([4])[0], together[1])
    assert torch.equal(run([5, 3]), together[[2, 0]])


def test_trajectory_hands_out_every_step():
    tableau, xt = heun(even_steps(4)), torch.randn(2, 3, 5, 7)
    before, weight = xt.clone(), torch.ones(1, requires_grad=True)
    calls = []

    def denoise(xt: Tensor, level: Level) -> Tensor:
        calls.append(level)
        return gaussian(xt, level) * weight

    steps = list(trajectory(denoise, xt, tableau, NO_NOISE))
    assert [step.index for step in steps] == list(range(7)) == list(range(len(tableau)))
    assert [level.t for level in calls] == tableau.steps.t.tolist()
    assert tableau.steps.t.tolist() == even_steps(4).t[[0, 1, 1, 2, 2, 3, 3]].tolist()
    assert torch.equal(steps[-1].xt, sample(denoise, xt, tableau, NO_NOISE))
    assert torch.equal(xt, before)
    for step in steps:
        assert step.xt.dtype == step.x0.dtype == torch.float32
        assert not step.xt.requires_grad
    assert torch.equal(next(trajectory(denoise, xt, tableau, NO_NOISE)).xt, steps[0].xt)  # and may be left


def test_gradients_are_on_outside_the_model():
    """A generator that is paused must not leave its no_grad behind."""
    run = trajectory(gaussian, torch.randn(1, 1, 3, 5), ddim(even_steps(3)), NO_NOISE)
    next(run)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_straight_path_is_followed_exactly(count):
    """Rectified flow (Liu et al. 2023, eq. 1): Euler with the right flow needs one step, from anywhere."""
    xt, flow = torch.randn(2, 3, 4, 5, 7, dtype=torch.float64)
    tableau = Scheduler.default("flow").tableau(count, "euler")
    end = sample(lambda xt, level: to_x0(flow, xt, level, "flow"), xt, tableau, NO_NOISE)
    torch.testing.assert_close(end, xt - flow)
