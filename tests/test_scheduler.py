"""Every solver on every grid runs as in diffusers 0.42, and what we do not implement is refused by name."""

import importlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from ldm.diffusion.sample import sample
from ldm.diffusion.schedule import Level, seen, to_flow, to_x0
from ldm.diffusion.scheduler import CLASSES, FLOW, GRIDS, PREDICTIONS, Scheduler
from ldm.diffusion.solvers import SOLVERS, ddim

T = 1000
SHAPE = (3, 4, 5, 7)  # odd on purpose
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": T}
KINDS = {kind: name for name, kind in PREDICTIONS.items()}
ON_RATIOS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")


WEIGHTS = torch.randn(2, SHAPE[1], SHAPE[1], generator=torch.Generator().manual_seed(7)) / SHAPE[1]
COUNTS = [4, 7, 20, pytest.param(50, marks=pytest.mark.slow)]


def toy_unet(xt: Tensor, t: Tensor | float) -> Tensor:
    """A random linear map of the channels that turns with t."""
    first, second = WEIGHTS.to(xt)
    angle = torch.as_tensor(t, dtype=xt.dtype).flatten()[0] * math.pi / 1500
    return torch.einsum("dc,bchw->bdhw", angle.cos() * first + angle.sin() * second, xt) + 0.1 * angle.sin()


def draw(index: int) -> Tensor:
    """The noise of step index, the same for both sides; -1 is the first."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1000 + index))


def config_of(solver: str, **settings: object) -> dict:
    """The scheduler_config.json of the class that solver has in diffusers."""
    config = {"_class_name": CLASSES[solver], **SD, "steps_offset": 1, **settings}
    if solver in ("ddim", "ddpm"):
        config["clip_sample"] = False
    if solver == "plms":
        config["skip_prk_steps"] = True
    if solver == "dpmpp_2m_sde":
        config["algorithm_type"] = "sde-dpmsolver++"
    return config


def reference_run(config: dict, count: int, monkeypatch: pytest.MonkeyPatch, eta: float = 0.0) -> Tensor:
    """The latents of the toy model by diffusers' own scheduler, started from our noise."""
    import diffusers

    name = config["_class_name"]
    reference = getattr(diffusers, name).from_config(config)
    # Its own table is float32, and 1 - alpha_bar[0] off by 7e-5 in it: both sides use ours.
    alpha_bar = Scheduler.from_config(config).schedule.alpha ** 2
    torch.testing.assert_close(reference.alphas_cumprod, alpha_bar.float(), atol=1e-7, rtol=2e-5)
    if config.get("rescale_betas_zero_snr") and name not in ("DDIMScheduler", "DDPMScheduler"):
        alpha_bar[-1] = reference.alphas_cumprod[-1]
    reference.alphas_cumprod = alpha_bar
    if name in ("DDIMScheduler", "PNDMScheduler") and not reference.config.set_alpha_to_one:
        reference.final_alpha_cumprod = alpha_bar[0]
    reference.set_timesteps(count)
    module, calls = importlib.import_module(type(reference).__module__), iter(range(T))
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: draw(next(calls)))
    times = reference.timesteps.tolist()
    kind = config["prediction_type"]
    on_ratios, options = name in ON_RATIOS, {"eta": eta} if name == "DDIMScheduler" else {}
    xt = draw(-1) * (1 + reference.sigmas[0] ** 2).sqrt() if on_ratios else draw(-1)
    if name == "PNDMScheduler":  # it would run Adams-Bashforth on v: give it the eps that belongs to it
        reference.register_to_config(prediction_type="epsilon")
    for index, t in enumerate(reference.timesteps):
        if name in ("DDIMScheduler", "PNDMScheduler"):  # on to the next timestep, not to t - T // count
            here, there = (0, 2) if (name, index) == ("PNDMScheduler", 1) else (index, index + 1)
            gap = times[here] - times[there] if there < len(times) else times[here] + 1
            reference.register_to_config(num_train_timesteps=int(gap))
            reference.num_inference_steps = 1
        prediction = toy_unet(reference.scale_model_input(xt, t), t)
        if name == "PNDMScheduler" and kind != "epsilon":
            alpha_bar = reference.alphas_cumprod[t]
            level = Level(float(t), alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
            x0 = to_x0(prediction, xt, level, PREDICTIONS[kind])
            prediction = (xt - level.alpha * x0) / level.sigma
        xt = reference.step(prediction, t, xt, **options).prev_sample
    ends_noisy = on_ratios and config.get("final_sigmas_type") == "sigma_min"
    return xt * reference.alphas_cumprod[0].sqrt() if ends_noisy else xt


def our_run(config: dict, count: int, **options: object) -> Tensor:
    scheduler = Scheduler.from_config(config)
    tableau = scheduler.tableau(count) if not options else ddim(scheduler.timesteps(count), **options)
    assert scheduler.solver in SOLVERS

    def denoise(xt: Tensor, level: Level) -> Tensor:
        return to_x0(toy_unet(xt, level.t), xt, level, scheduler.prediction)

    return sample(denoise, draw(-1), tableau, draw)


def assert_same_run(config: dict, count: int, monkeypatch: pytest.MonkeyPatch, **options: float) -> None:
    ours, theirs = our_run(config, count, **options), reference_run(config, count, monkeypatch, **options)
    assert theirs.isfinite().all()
    tolerance = 1e-5
    if config.get("rescale_betas_zero_snr") and config["_class_name"] in ON_RATIOS:
        tolerance = 2e-4  # it holds x / alpha, 4096 times x, in float32
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("solver", [name for name in CLASSES if name != "euler_a"])
def test_runs_as_diffusers_does(solver, kind, spacing, count, monkeypatch):
    config = config_of(solver, prediction_type=KINDS[kind], timestep_spacing=spacing)
    assert_same_run(config, count, monkeypatch)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("kind", ["eps", "v"])  # diffusers' does not take x0
def test_runs_as_diffusers_euler_ancestral_does(kind, spacing, count, monkeypatch):
    config = config_of("euler_a", prediction_type=KINDS[kind], timestep_spacing=spacing)
    assert_same_run(config, count, monkeypatch)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("solver", "curve"),
    [
        *itertools.product(
            ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"],
            ["use_karras_sigmas", "use_exponential_sigmas"],
        ),
        ("dpmpp_2m", "use_lu_lambdas"),
    ],
)
def test_runs_on_curves_as_diffusers_does(solver, curve, count, monkeypatch):
    for kind in ("eps", "v", "x0"):
        assert_same_run(config_of(solver, prediction_type=KINDS[kind], **{curve: True}), count, monkeypatch)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "solver", ["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm"]
)
def test_runs_from_zero_snr_as_diffusers_does(solver, count, monkeypatch):
    config = config_of(
        solver, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    assert_same_run(config, count, monkeypatch)


@pytest.mark.parametrize("count", [1, *COUNTS])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flows_run_as_diffusers_does(shift, count):
    """Euler's method on the straight line is DDIM here, and the model sees the same at every level."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = {"_class_name": FLOW, "num_train_timesteps": T, "shift": shift}
    reference = FlowMatchEulerDiscreteScheduler.from_config(config)
    reference.set_timesteps(count)
    x = draw(-1)
    for t in reference.timesteps:
        x = reference.step(toy_unet(x, t), t, x).prev_sample
    scheduler = Scheduler.from_config(config)
    assert scheduler.solver == "euler"
    torch.testing.assert_close(scheduler.timesteps(count).t.float(), reference.timesteps)

    def denoise(xt: Tensor, level: Level) -> Tensor:
        return to_x0(toy_unet(seen(xt, level, "flow"), level.t), xt, level, "flow")

    ours = sample(denoise, draw(-1), scheduler.tableau(count), draw)
    assert (ours - x).abs().max() <= 1e-5 * x.abs().max().clamp(min=1)


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "dpmpp_2m", "unipc", "plms"])
def test_every_solver_follows_a_flow(solver):
    """For data N(0, 0.5**2) the ODE takes noise x to x / 2; more steps come nearer, and no level is off."""

    def denoise(xt: Tensor, level: Level) -> Tensor:
        gain = level.alpha * 0.25 / (level.alpha**2 * 0.25 + level.sigma**2)
        return to_x0(to_flow(gain * xt, xt, level), xt, level, "flow")

    errors = []
    for count in (10, 40):
        end = sample(denoise, draw(-1), Scheduler.default("flow").tableau(count, solver), draw)
        errors.append((end - draw(-1) / 2).abs().max().item())
    assert errors[1] < 0.4 * errors[0]
    assert errors[1] < 0.08


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shift": 0}, "shift=0: expected a number above 0"),
        ({"shift": "3"}, "shift='3': expected a number above 0"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True is not implemented"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True is not implemented"),
    ],
)
def test_flows_that_are_not_implemented_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Scheduler.from_config({"_class_name": FLOW, **setting})


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddim_eta(eta, zero_snr, monkeypatch):
    config = config_of(
        "ddim", prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing"
    )
    assert_same_run(config, 20, monkeypatch, eta=eta)


@pytest.mark.parametrize(
    ("solver", "settings"),
    [
        ("ddim", {"set_alpha_to_one": False}),
        ("plms", {"set_alpha_to_one": True}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("euler", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}),
        ("dpmpp_2m_sde", {"final_sigmas_type": "sigma_min"}),
        ("unipc", {"final_sigmas_type": "sigma_min"}),
        ("unipc", {"solver_order": 1}),
        ("unipc", {"solver_order": 3}),
        ("unipc", {"solver_order": 3, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
        ("ddim", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
        ("dpmpp_2m", {"beta_schedule": "squaredcos_cap_v2"}),
        ("ddim", {"trained_betas": [0.01 + 0.0001 * i for i in range(100)], "num_train_timesteps": 100}),
        ("heun", {"steps_offset": 3, "timestep_spacing": "leading"}),
    ],
)
def test_settings_as_diffusers_reads_them(solver, settings, monkeypatch):
    for count in (7, 20):
        assert_same_run(config_of(solver, prediction_type="v_prediction", **settings), count, monkeypatch)


def test_the_timesteps_of_consistency_models_are_those_of_diffusers():
    from diffusers import LCMScheduler

    for T, original in ((1000, 50), (1000, 33), (999, 100), (100, 100)):
        config = config_of("lcm", prediction_type="epsilon") | {"num_train_timesteps": T}
        config["original_inference_steps"] = original
        ours, theirs = Scheduler.from_config(config), LCMScheduler.from_config(config)
        for count in range(1, original + 1):
            theirs.set_timesteps(count)
            assert ours.timesteps(count).t.tolist() == theirs.timesteps.tolist()
        assert ours.timesteps(1).alpha[-1] == 1
        with pytest.raises(
            ValueError, match=f"{original + 1} steps: consistency models take 1 to .*{original}"
        ):
            ours.timesteps(original + 1)
    with pytest.raises(ValueError, match="original_inference_steps=200: expected 1 to 100"):
        Scheduler.from_config(config | {"original_inference_steps": 200}).timesteps(4)


def test_the_scheduler_of_a_distilled_model():
    """The same noise for diffusers' class, whose betas have other defaults, and only its timesteps differ."""
    from diffusers import LCMScheduler

    sparse = {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction", "trained_betas": None}
    for teacher in (Scheduler.default(), Scheduler.from_config(sparse)):
        student = teacher.distilled(25)
        assert (student.solver, student.prediction) == ("lcm", "v")
        assert torch.equal(student.schedule.alpha, teacher.schedule.alpha)
        theirs = LCMScheduler.from_config(dict(student.config))
        torch.testing.assert_close(
            theirs.alphas_cumprod.double(), teacher.schedule.alpha**2, atol=1e-6, rtol=0
        )
        theirs.set_timesteps(4)
        assert student.timesteps(4).t.tolist() == theirs.timesteps.tolist() == [999, 759, 519, 279]
    with pytest.raises(ValueError, match="LCMScheduler of diffusers knows no flow"):
        Scheduler.default("flow").distilled()


def test_how_far_the_boundary_condition_is_from_diffusers():
    """As solvers.consistency says; without noise in between it is c_skip (x - x0) and (c_out - 1) x0."""
    from diffusers import LCMScheduler

    reference = LCMScheduler.from_config(config_of("lcm", prediction_type="epsilon"))
    for t, most in ((19, 7e-6), (159, 1e-7), (999, 2.6e-9)):
        skip, out = reference.get_scalings_for_boundary_condition_discrete(t)
        assert 0.9 * most < skip < most
        assert abs(out - 1) < most


def test_another_solver_is_what_from_config_of_its_class_would_be(monkeypatch):
    """In diffusers that is `DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`."""
    config = config_of("plms", prediction_type="epsilon", steps_offset=1)
    for solver in ("ddim", "euler", "dpmpp_2m", "unipc"):
        tableau = Scheduler.from_config(config).tableau(7, solver)
        theirs = reference_run(
            config | {"_class_name": CLASSES[solver], "clip_sample": False}, 7, monkeypatch
        )
        ours = sample(
            lambda xt, level: to_x0(toy_unet(xt, level.t), xt, level, "eps"), draw(-1), tableau, draw
        )
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_tables_and_names_agree():
    assert set(CLASSES) == set(SOLVERS)
    assert set(CLASSES.values()) == set(GRIDS)


@pytest.mark.parametrize("solver", CLASSES)
def test_default_runs_with_every_solver(solver):
    """Our own models: exactly zero SNR, no NaN, in any number of steps."""
    scheduler = Scheduler.default()
    assert (scheduler.prediction, scheduler.solver, scheduler.schedule.alpha[-1]) == ("v", "ddim", 0)
    for count in (1, 2, 3, 7, 50):
        tableau = scheduler.tableau(count, solver)
        assert tableau.steps.alpha[0] == 0
        end = sample(lambda xt, level: to_x0(toy_unet(xt, level.t), xt, level, "v"), draw(-1), tableau, draw)
        assert end.isfinite().all()


def test_skip_starts_later():
    scheduler = Scheduler.default()
    whole, rest = scheduler.tableau(10), scheduler.tableau(10, skip=4)
    assert rest.steps.t.tolist() == whole.steps.t[4:].tolist()
    assert rest.a.tolist() == whole.a[4:].tolist()


def test_config_is_kept_as_it_was_read():
    config = config_of("euler", prediction_type="epsilon", of_another_program={"a": [1]})
    scheduler = Scheduler.from_config(config)
    scheduler.tableau(5)
    assert scheduler.config == config_of("euler", prediction_type="epsilon", of_another_program={"a": [1]})


def test_default_is_read_by_diffusers():
    from diffusers import DDIMScheduler

    config = Scheduler.default().config
    theirs = DDIMScheduler.from_config(dict(config))
    theirs.set_timesteps(20)
    assert theirs.timesteps.tolist() == Scheduler.default().timesteps(20).t.tolist()
    assert {key: theirs.config[key] for key in config if key != "_class_name"} == {
        key: value for key, value in config.items() if key != "_class_name"
    }
    assert Scheduler.default("eps", zero_terminal_snr=False).prediction == "eps"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "TCDScheduler"}, "'TCDScheduler' is not implemented: expected one of DDIMScheduler"),
        ({"_class_name": None}, "None is not implemented"),
        ({"prediction_type": "flow_prediction"}, "'flow_prediction': expected one of epsilon, v_prediction"),
        ({"beta_schedule": "sigmoid"}, "'sigmoid': expected linear, scaled_linear or squaredcos_cap_v2"),
        ({"thresholding": True}, "DDIMScheduler with thresholding=True is not implemented: set it to False"),
        ({"variance_type": "learned"}, "variance_type='learned' is not implemented"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order=3 .* set it to 2"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, "skip_prk_steps=False .* set it to True"),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "zero terminal SNR.*v or x0"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000': expected a whole number from 1"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0: expected a whole number from 1"),
        ({"steps_offset": -1}, "steps_offset=-1: expected a whole number from 0"),
        ({"beta_end": 1.5}, "beta_end=1.5: expected a number between 0 and 1"),
        ({"beta_start": None}, "beta_start=None: expected a number between 0 and 1"),
        ({"trained_betas": [0.1, "x"]}, r"trained_betas\[1\]='x': expected a number between 0 and 1"),
        ({"trained_betas": []}, r"trained_betas=\[\]: expected a list"),
        ({"original_inference_steps": 0}, "original_inference_steps=0: expected a whole number from 1"),
        ({"_class_name": "LCMScheduler", "timestep_scaling": 1.0}, "timestep_scaling=1.0 .* set it to 10.0"),
    ],
)
def test_what_is_not_implemented_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Scheduler.from_config(config_of("ddim") | settings)


def test_calls_that_make_no_sense_are_refused():
    scheduler = Scheduler.from_config(config_of("ddim", prediction_type="epsilon"))
    with pytest.raises(ValueError, match="unknown sampler 'magic': expected one of ddim, ddpm, plms"):
        scheduler.tableau(5, "magic")
    with pytest.raises(ValueError, match="0 steps: ask for 1 to 1000"):
        scheduler.tableau(0)
    with pytest.raises(ValueError, match="1000 steps start at t=1000, past the last: ask for fewer"):
        scheduler.tableau(1000)
    with pytest.raises(ValueError, match="share noise levels"):
        Scheduler.from_config(config_of("dpmpp_2m", prediction_type="epsilon")).tableau(1000)
