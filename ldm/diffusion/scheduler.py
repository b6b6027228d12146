"""diffusers' scheduler_config.json, read as configuration: which schedule, which prediction, which timesteps.

Nothing here is stepped and nothing changes: the class named in the file only says where a run looks (its
grid) and which table it uses by default. The grids are those of diffusers 0.42. One difference: its DDIM and
PNDM step to t - T // count, which is the next timestep with "leading" spacing, and with "trailing" if count
divides T, but otherwise a level at which the next call does not start. Here a step ends where the next one
starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedule import NoiseSchedule, Prediction, Timesteps, curve, lay_out, skipped
from .solvers import SOLVERS, Tableau, unipc

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
FLOW = "FlowMatchEulerDiscreteScheduler"  # its one schedule and one kind of prediction are no settings
LCM = "LCMScheduler"  # its timesteps are those of the distillation, whatever the spacing


class Grid(NamedTuple):
    """How a scheduler class of diffusers lays out its timesteps."""

    spacing: str = "linspace"  # where the file does not name a timestep_spacing
    whole: bool = True  # t is rounded
    extra: int = 0  # timesteps laid out and then cut off at the clean end
    curves: bool = False  # Karras and exponential noise levels can be asked for
    last: tuple[str, object] = ("", True)  # the key that says where a run ends, and its default
    smallest_alpha: float = 0.0  # Euler and DPM-Solver put 2**-24 for alpha_bar = 0, to divide by it


ZERO = ("final_sigmas_type", "zero")
GRIDS = {
    "DDIMScheduler": Grid("leading", last=("set_alpha_to_one", True)),
    "DDPMScheduler": Grid("leading"),
    "PNDMScheduler": Grid("leading", last=("set_alpha_to_one", False)),
    "EulerDiscreteScheduler": Grid(whole=False, curves=True, last=ZERO, smallest_alpha=2**-12),
    "EulerAncestralDiscreteScheduler": Grid(whole=False, smallest_alpha=2**-12),
    "HeunDiscreteScheduler": Grid(whole=False, curves=True),
    "DPMSolverMultistepScheduler": Grid(extra=1, curves=True, last=ZERO, smallest_alpha=2**-12),
    "UniPCMultistepScheduler": Grid(extra=1, curves=True, last=ZERO, smallest_alpha=2**-12),
    LCM: Grid(),
}
CLASSES = {  # the class that a solver has in diffusers; the first solver of a class is its default
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "plms": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": LCM,
}
BETAS = {  # beta_start, beta_end, beta_schedule where a file does not say; else 0.0001, 0.02, linear
    "HeunDiscreteScheduler": (0.00085, 0.012, "linear"),
    LCM: (0.00085, 0.012, "scaled_linear"),
}
CURVES = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "log_snr", "use_lu_lambdas": "log_snr"}
# Settings that are not implemented, and the values with which they change nothing.
ACCEPTED: dict[str, tuple[object, ...]] = {
    "thresholding": (False,),
    "use_beta_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "timestep_type": ("discrete",),
    "interpolation_type": ("linear",),
    "variance_type": (None, "fixed_small", "fixed_small_log", "learned_range"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "solver_type": ("midpoint", "bh2"),
    "euler_at_final": (False,),
    "lower_order_final": (True,),
    "lambda_min_clipped": (None, -float("inf")),
    "predict_x0": (True,),
    "solver_p": (None,),
    "disable_corrector": ([],),
    "skip_prk_steps": (True,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
    "timestep_scaling": (10.0,),
}
ACCEPTED_OF_FLOW: dict[str, tuple[object, ...]] = dict.fromkeys(CURVES, (False, None))


MAX_TIMESTEPS = 1_000_000


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the key, for a number of a scheduler_config.json that cannot be."""
    shift = config.get("shift", 1.0)
    if not isinstance(shift, int | float) or isinstance(shift, bool) or not 0 < shift <= MAX_TIMESTEPS:
        raise ValueError(f"shift={shift!r}: expected a number above 0; 1 changes nothing, 3 is SD 3's")
    least = {"num_train_timesteps": 1, "steps_offset": 0, "solver_order": 1, "original_inference_steps": 1}
    for key, low in least.items():
        value = config.get(key, low)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= MAX_TIMESTEPS:
            raise ValueError(f"{key}={value!r}: expected a whole number from {low} to {MAX_TIMESTEPS}")
    betas = {key: config[key] for key in ("beta_start", "beta_end") if key in config}
    trained = config.get("trained_betas")
    if trained is not None and (not isinstance(trained, list | tuple) or not trained):
        raise ValueError(f"trained_betas={trained!r}: expected a list of numbers between 0 and 1")
    betas |= {f"trained_betas[{i}]": beta for i, beta in enumerate(trained or [])}
    for key, beta in betas.items():
        if not isinstance(beta, int | float) or not 0 < beta < 1:
            raise ValueError(f"{key}={beta!r}: expected a number between 0 and 1")


def betas_of(config: Mapping[str, Any]) -> tuple[float, float, str]:
    """beta_start, beta_end and beta_schedule."""
    start, end, name = BETAS.get(config["_class_name"], (0.0001, 0.02, "linear"))
    return config.get("beta_start", start), config.get("beta_end", end), config.get("beta_schedule", name)


def read_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a scheduler_config.json. Raises ValueError for an unknown beta_schedule."""
    start, end, name = betas_of(config)
    T = config.get("num_train_timesteps", 1000)
    if config["_class_name"] == FLOW:
        schedule = NoiseSchedule.rectified_flow(T)
    elif config.get("trained_betas") is not None:
        schedule = NoiseSchedule.from_betas(torch.tensor(config["trained_betas"]))
    elif name == "linear":
        schedule = NoiseSchedule.linear(start, end, T)
    elif name == "scaled_linear":
        schedule = NoiseSchedule.scaled_linear(start, end, T)
    elif name == "squaredcos_cap_v2":
        schedule = NoiseSchedule.cosine(T)
    else:
        raise ValueError(f"beta_schedule={name!r}: expected linear, scaled_linear or squaredcos_cap_v2")
    return schedule.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule


def flow_timesteps(count: int, T: int, shift: float) -> Timesteps:
    """s = t / T even from 1 to where the training's least, shifted, lies, then shifted itself.

    So it is in diffusers, whose last step is shifted twice. Shift: Esser et al. 2024, eq. 23. Every solver
    takes this grid. Raises ValueError for a count that is not between 1 and T.
    """
    if not 1 <= count <= T:
        raise ValueError(f"{count} steps: ask for 1 to {T}, the model has no more noise levels")

    def shifted(s: Tensor) -> Tensor:
        return shift * s / (1 + (shift - 1) * s)

    one = torch.ones((), dtype=torch.float64)
    s = shifted(torch.linspace(1, shifted(one / T).item(), count, dtype=torch.float64))
    return Timesteps.from_ratio(s * T, s / (1 - s))


@dataclass(frozen=True)
class Scheduler:
    """A scheduler_config.json: config as it was read, and what it means."""

    config: Mapping[str, Any]
    schedule: NoiseSchedule
    prediction: Prediction
    solver: str  # the name in SOLVERS that the class stands for

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Scheduler:
        """From the content of a scheduler_config.json. clip_sample is ignored: latents are not clipped.

        Raises ValueError for a class, prediction or setting that is not implemented, and for eps at zero SNR.
        """
        name = config.get("_class_name")
        if name not in (*GRIDS, FLOW):
            known = ", ".join((*GRIDS, FLOW))
            raise ValueError(f"scheduler {name!r} is not implemented: expected one of {known}")
        kind = config.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            raise ValueError(f"prediction_type={kind!r}: expected one of {', '.join(PREDICTIONS)}")
        stated = {"skip_prk_steps": name != "PNDMScheduler"} | dict(config)
        accepted = ACCEPTED | ({"solver_order": (2,)} if name == "DPMSolverMultistepScheduler" else {})
        for key, values in (accepted | (ACCEPTED_OF_FLOW if name == FLOW else {})).items():
            if key in stated and stated[key] not in values:
                raise ValueError(
                    f"{name} with {key}={stated[key]!r} is not implemented: set it to "
                    f"{' or '.join(map(repr, values))} in scheduler_config.json"
                )
        check_numbers(config)
        schedule = read_schedule(config)
        if name == FLOW:
            return cls(config, schedule, "flow", "euler")
        schedule.require(PREDICTIONS[kind])
        solver = next(solver for solver, its_class in CLASSES.items() if its_class == name)
        if config.get("algorithm_type") == "sde-dpmsolver++" and solver == "dpmpp_2m":
            solver = "dpmpp_2m_sde"
        return cls(config, schedule, PREDICTIONS[kind], solver)

    @classmethod
    def default(cls, prediction: Prediction = "v", zero_terminal_snr: bool = True) -> Scheduler:
        """What our own models train with: Stable Diffusion's schedule down to zero SNR, v, trailing spacing.

        Lin et al. 2024 say why the three belong together. flow: rectified flow, which has its own schedule.
        Raises ValueError for eps with zero_terminal_snr.
        """
        if prediction == "flow":
            return cls.from_config({"_class_name": FLOW, "num_train_timesteps": 1000, "shift": 1.0})
        kind = next(name for name, ours in PREDICTIONS.items() if ours == prediction)
        return cls.from_config(
            {
                "_class_name": "DDIMScheduler",
                "num_train_timesteps": 1000,
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "prediction_type": kind,
                "rescale_betas_zero_snr": zero_terminal_snr,
                "timestep_spacing": "trailing",
                "steps_offset": 1,  # for stock pipelines, which warn at anything else
                "set_alpha_to_one": True,
                "clip_sample": False,
            }
        )

    def distilled(self, original_inference_steps: int = 50) -> Scheduler:
        """LCMScheduler's configuration with this noise and prediction: of a model distilled from this one.

        Raises ValueError for a flow, which diffusers' LCMScheduler cannot draw with.
        """
        if self.config["_class_name"] == FLOW:
            raise ValueError(f"{LCM} of diffusers knows no flow: distil a model that predicts v, eps or x0")
        start, end, name = betas_of(self.config)
        kept = ("num_train_timesteps", "trained_betas", "prediction_type", "rescale_betas_zero_snr")
        return Scheduler.from_config(
            {
                "_class_name": LCM,
                **{key: self.config[key] for key in kept if key in self.config},
                "beta_start": start,
                "beta_end": end,
                "beta_schedule": name,
                "original_inference_steps": original_inference_steps,
                "set_alpha_to_one": True,
                "clip_sample": False,
            }
        )

    def timesteps(self, count: int, solver: str | None = None) -> Timesteps:
        """The grid that diffusers' class for this solver lays out under this configuration, for count steps.

        A flow has one grid for all solvers.

        Raises ValueError for an unknown solver, and for a count that the schedule has no levels for.
        """
        name = solver or self.solver
        if name not in CLASSES:
            raise ValueError(f"unknown sampler {name!r}: expected one of {', '.join(CLASSES)}")
        if self.config["_class_name"] == FLOW:
            return flow_timesteps(
                count, self.config.get("num_train_timesteps", 1000), self.config.get("shift", 1.0)
            )
        grid, config, schedule = GRIDS[CLASSES[name]], self.config, self.schedule
        if schedule.alpha[-1] == 0 and CLASSES[name] == config["_class_name"]:
            alpha = schedule.alpha.clamp(min=grid.smallest_alpha)
            schedule = NoiseSchedule(alpha, (1 - alpha**2).sqrt())
        if CLASSES[name] == LCM:
            t = skipped(len(schedule.alpha), count, config.get("original_inference_steps", 50))
        else:
            t = lay_out(
                len(schedule.alpha),
                count,
                config.get("timestep_spacing", grid.spacing),
                offset=config.get("steps_offset", 0),
                points=count + grid.extra,
                whole=grid.whole,
            )
        if t[0] >= len(schedule.alpha):
            raise ValueError(f"{count} steps start at t={t[0]:.0f}, past the last: ask for fewer steps")
        ratio = schedule.ratio_at(t)
        asked = next((key for key in CURVES if grid.curves and config.get(key)), None)
        if asked:
            ends = (schedule.ratio[-1], schedule.ratio[0]) if grid.whole else (ratio[0], ratio[-1])
            ratio = curve(*ends, count, CURVES[asked])
            t = schedule.t_at(ratio)
            if grid.whole:  # diffusers truncates the exponential ones; a rounding error must not cost a step
                t = (t + 1e-3).floor() if asked == "use_exponential_sigmas" else t.round()
        key, default = grid.last
        end = 1.0 if config.get(key, default) in (True, "zero") else float(schedule.alpha[0])
        return Timesteps.from_ratio(t, ratio, end)

    def learns_variance(self, solver: str | None = None) -> bool:
        """Whether a run takes the deviation of its noise from a UNet that tells it: by DDPM, unless fixed."""
        own = self.config.get("variance_type", "learned_range") == "learned_range"
        return own and (solver or self.solver) == "ddpm"

    def tableau(self, count: int, solver: str | None = None, skip: int = 0) -> Tableau:
        """The table of a run of count steps, less its first skip (image-to-image), by this or that solver."""
        name = solver or self.solver
        steps = self.timesteps(count, name).skip(skip)
        return unipc(steps, self.config.get("solver_order", 2)) if name == "unipc" else SOLVERS[name](steps)
