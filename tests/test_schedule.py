"""Laws of the noise schedules, and of the ways to look at them."""

import math

import pytest
import torch

from ldm.diffusion.schedule import (
    Level,
    NoiseSchedule,
    Timesteps,
    curve,
    lay_out,
    sections,
    to_eps,
    to_flow,
    to_v,
    to_x0,
)

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "zero_snr": NoiseSchedule.scaled_linear().zero_terminal_snr(),
    "short": NoiseSchedule.linear(T=37),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_variance_is_preserved_and_noise_grows(name):
    schedule = SCHEDULES[name]
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float64
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones_like(schedule.alpha))
    assert (schedule.alpha.diff() < 0).all()
    assert (schedule.sigma.diff() > 0).all()


def test_known_values():
    """alpha_bar of Stable Diffusion, and the two formulas of the cosine schedule, at their ends."""
    alpha_bar = SCHEDULES["scaled_linear"].alpha ** 2
    assert alpha_bar[0].item() == pytest.approx(1 - 0.00085)
    assert alpha_bar[-1].item() == pytest.approx(0.0046601, rel=1e-4)
    cosine = SCHEDULES["cosine"].alpha ** 2
    middle = (
        math.cos((500 / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    )
    assert cosine[499].item() == pytest.approx(middle)
    assert (cosine[-1] / cosine[-2]).item() == pytest.approx(1 - 0.999)


def test_zero_terminal_snr_keeps_the_first_level():
    before, after = SCHEDULES["scaled_linear"], SCHEDULES["zero_snr"]
    assert after.alpha[-1] == 0
    assert after.sigma[-1] == 1
    assert after.alpha[0] == pytest.approx(before.alpha[0].item(), rel=1e-15)
    assert after.ratio[-1].isinf()


@pytest.mark.parametrize("t", [0, 1, 421, 998, 999])
def test_predictions_convert_both_ways(t):
    """At every level, zero SNR included, v and x0 say the same; eps does where alpha > 0."""
    schedule = SCHEDULES["zero_snr"]
    x0, noise = torch.randn(2, 2, 3, 5, 7, dtype=torch.float64)
    level = schedule.at(torch.tensor([t, t]), like=x0)
    xt = level.alpha * x0 + level.sigma * noise
    torch.testing.assert_close(to_eps(x0, xt, level), noise)
    v = to_v(x0, xt, level)
    torch.testing.assert_close(v, level.alpha * noise - level.sigma * x0)
    torch.testing.assert_close(to_x0(v, xt, level, "v"), x0)
    torch.testing.assert_close(to_x0(x0, xt, level, "x0"), x0)
    flow = to_flow(x0, xt, level)
    torch.testing.assert_close(flow, noise - x0)
    torch.testing.assert_close(to_x0(flow, xt, level, "flow"), x0)
    if t < 999:
        torch.testing.assert_close(to_x0(noise, xt, level, "eps"), x0)


def test_rectified_flow_is_the_straight_line_and_keeps_variance():
    schedule = NoiseSchedule.rectified_flow(8)
    torch.testing.assert_close(
        schedule.sigma / (schedule.alpha + schedule.sigma), torch.arange(9).double() / 8
    )
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(9).double())


def test_eps_at_zero_snr_is_refused():
    with pytest.raises(ValueError, match=r"zero terminal SNR.*v or x0"):
        to_x0(torch.zeros(1), torch.zeros(1), Level(999.0, 0.0, 1.0), "eps")
    with pytest.raises(ValueError, match=r"zero terminal SNR.*v or x0"):
        SCHEDULES["zero_snr"].require("eps")
    SCHEDULES["zero_snr"].require("v")
    SCHEDULES["linear"].require("eps")


def test_at_broadcasts_over_the_sample():
    x0 = torch.zeros(3, 4, 5, 7)
    t = torch.tensor([0, 500, 999])
    level = SCHEDULES["linear"].at(t, like=x0)
    assert level.alpha.shape == level.sigma.shape == (3, 1, 1, 1)
    assert level.alpha.dtype == torch.float32
    torch.testing.assert_close(
        level.alpha.flatten().double(), SCHEDULES["linear"].alpha[t], atol=1e-7, rtol=0
    )


@pytest.mark.parametrize(
    ("spacing", "count", "options", "expected"),
    [
        ("leading", 4, {}, [750, 500, 250, 0]),
        ("leading", 3, {"offset": 1}, [667, 334, 1]),
        ("leading", 4, {"points": 5}, [800, 600, 400, 200]),
        ("linspace", 3, {}, [999, 500, 0]),
        ("linspace", 3, {"whole": False}, [999, 499.5, 0]),
        ("linspace", 3, {"points": 4}, [999, 666, 333]),
        ("trailing", 4, {}, [999, 749, 499, 249]),
        ("trailing", 7, {}, [999, 856, 713, 570, 428, 285, 142]),
        ("trailing", 1, {}, [999]),
    ],
)
def test_spacings_of_lin_et_al(spacing, count, options, expected):
    assert lay_out(1000, count, spacing, **options).tolist() == expected


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_count_lies_on_the_schedule(spacing):
    for count in range(1, 1001):
        t = lay_out(1000, count, spacing, whole=False)
        assert len(t) == count
        assert t.min() >= 0
        assert t.max() <= 999


@pytest.mark.parametrize("spacing", ["trailing", "karras", "log_snr"])
def test_timesteps_fall_from_noise_to_data(spacing):
    steps = SCHEDULES["scaled_linear"].timesteps(13, spacing)
    assert len(steps) == len(list(steps)) == 13
    assert steps.t[0] == 999
    assert (steps.t.diff() < 0).all()
    assert (steps.alpha[-1], steps.sigma[-1]) == (1, 0)
    for level in steps:  # a level is on the schedule, between whole timesteps too
        low, high = (SCHEDULES["scaled_linear"].alpha[f(level.t)] for f in (math.ceil, math.floor))
        assert low - 1e-9 <= level.alpha <= high + 1e-9
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1)


def test_even_log_snr_and_karras_curves():
    schedule = SCHEDULES["scaled_linear"]
    even = schedule.timesteps(9, "log_snr").log_snr[:-1].diff()
    torch.testing.assert_close(even, even[:1].expand(8))
    karras = schedule.timesteps(9, "karras")
    root = (karras.sigma / karras.alpha)[:-1] ** (1 / 7)
    torch.testing.assert_close(root.diff(), root.diff()[:1].expand(8))
    torch.testing.assert_close(schedule.t_at(schedule.ratio), torch.arange(1000.0, dtype=torch.float64))


def test_zero_snr_starts_exactly_there():
    steps = SCHEDULES["zero_snr"].timesteps(5)
    assert (steps.alpha[0], steps.sigma[0], steps.log_snr[0]) == (0, 1, -math.inf)
    assert steps.alpha.isfinite().all()
    assert steps.sigma.isfinite().all()
    assert len(steps.skip(2)) == 3
    assert steps.skip(2).alpha.tolist() == steps.alpha[2:].tolist()


def test_what_cannot_be_laid_out_is_refused():
    schedule = SCHEDULES["linear"]
    for count in (0, -1, 1001):
        with pytest.raises(ValueError, match=f"{count} steps: ask for 1 to 1000"):
            schedule.timesteps(count)
    with pytest.raises(ValueError, match="'log': expected leading, linspace or trailing"):
        schedule.timesteps(5, "log")
    with pytest.raises(ValueError, match="karras spacing cannot start at zero SNR: use trailing"):
        SCHEDULES["zero_snr"].timesteps(5, "karras")
    with pytest.raises(ValueError, match="2 steps share noise levels"):
        Timesteps.from_ratio(torch.tensor([3.0, 3.0]), torch.tensor([2.0, 2.0], dtype=torch.float64))
    one = curve(*torch.tensor([4.0, 1.0], dtype=torch.float64), 1, "karras")
    assert one.tolist() == pytest.approx([4])


@pytest.mark.parametrize(
    ("T", "counts", "expected"),
    [
        (1000, "ddim25", list(range(0, 1000, 40))),
        (1000, "ddim1000", list(range(1000))),
        (12, "4", [0, 4, 7, 11]),
        (11, "3,1,2", [0, 2, 3, 4, 8, 10]),  # sections of 4, 4 and 3
        (1000, "1", [0]),
    ],
)
def test_sections_are_those_of_improved_ddpm(T, counts, expected):
    assert sections(T, counts).flip(0).tolist() == expected


def test_a_respaced_run_keeps_the_noise_levels():
    """beta' = 1 - alpha_bar / alpha_bar before (Nichol & Dhariwal 2021, eq. 19): the levels stay."""
    schedule = SCHEDULES["cosine"]
    steps = schedule.respaced("10,10,5")
    t = steps.t.long()
    assert len(steps) == 25
    torch.testing.assert_close(
        steps.alpha, torch.cat([schedule.alpha[t], torch.ones(1, dtype=torch.float64)])
    )
    betas = 1 - (steps.alpha[:-1] / steps.alpha[1:]) ** 2
    torch.testing.assert_close(NoiseSchedule.from_betas(betas.flip(0)).alpha, schedule.alpha[t].flip(0))


def test_sections_that_cannot_be_are_refused():
    for counts, message in (
        ("10;5", "expected numbers such as 10,10,5, or ddim25"),
        ("ddim", "expected numbers such as"),
        ("ddim600", "no whole stride takes 600 of 1000 timesteps"),
        ("10,600", "expected 1 to 500 of section 2"),
        ("0", "expected 1 to 1000 of section 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sections(1000, counts)
