"""What a call of the pipeline is given, checked and made tensors: prompts to contexts, seeds to noise."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.noise import Noise, slerp, start_noise, step_noise
from ldm.diffusion.sample import Step
from ldm.diffusion.solvers import Tableau
from ldm.model.context import Context
from ldm.recipes import options

Prompt = str | None  # None: nothing is said
Encode = Callable[[Sequence[Prompt]], Context]  # prompts -> (B, N, D), and what else the UNet is told
Generators = torch.Generator | Sequence[torch.Generator]
Variation = tuple[int | Sequence[int], float]  # seed of the other noise, and how far to go there: 0 to 1
Callback = Callable[[Any, int, int, dict[str, Tensor]], "dict[str, Tensor] | None"]


def prompt_list(prompt: str | Sequence[str] | None, name: str) -> list[str] | None:
    """The prompts as a list. Raises ValueError unless they are None, a string or strings of valid Unicode."""
    if prompt is None:
        return None
    if not isinstance(prompt, str | Sequence) or (not prompt and prompt != ""):
        raise ValueError(f"{name}={prompt!r}: expected a string or a list of strings")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    for each in prompts:
        options.check_prompt(each, name)
    return prompts


def negative_list(negative: str | Sequence[Prompt] | None) -> Sequence[Prompt] | None:
    """As prompt_list. None in a list: no negative prompt, which SDXL tells from an empty one."""
    if not isinstance(negative, list | tuple):
        return prompt_list(negative, "negative_prompt")  # type: ignore[arg-type]
    prompt_list(["" if each is None else each for each in negative], "negative_prompt")
    return negative


def context_of(
    prompts: Sequence[Prompt] | None,
    embeds: Tensor | Context | None,
    encode: Encode,
    shape: Sequence[int | None],
    name: str,
) -> Context:
    """The embeddings (B, N, D) of the prompts, or those given in their place, with what else is told.

    shape: what to expect of (B, N, D), None for any; one prompt stands for all B.
    Raises ValueError unless exactly one of prompts and embeds is given, or if they have another shape.
    """
    if (prompts is None) == (embeds is None):
        raise ValueError(f"give either {name} or {name}_embeds")
    if embeds is None:
        assert prompts is not None
        if shape[0] not in (None, len(prompts)) and len(prompts) != 1:
            raise ValueError(f"{len(prompts)} of {name} for {shape[0]} prompts: give one, or one for each")
        context = encode(prompts)
        tokens = context.embeddings.shape[1]
        if shape[1] not in (None, tokens):
            raise ValueError(
                f"{name} has {tokens} tokens, the other embeddings {shape[1]}: give {name}_embeds"
            )
        return context.each(lambda rows: rows.expand(shape[0] or -1, *rows.shape[1:]))
    context = Context.of(embeds)
    found = context.embeddings.shape
    if len(found) != 3 or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
        expected = ", ".join(
            letter if want is None else str(want) for want, letter in zip(shape, "BND", strict=True)
        )
        raise ValueError(f"{name}_embeds has shape {tuple(found)}: expected ({expected})")
    return context


def devices() -> list[str]:
    """The kinds of device that this machine has, the fastest first."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, here in usable.items() if here]


def check_device(name: str | torch.device) -> torch.device:
    """The device by its name. Raises ValueError, with those that are, if this machine does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in devices():
        raise ValueError(f"device={str(name)!r} is not here: this machine has {', '.join(devices())}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device={str(name)!r}: there are {count} CUDA devices, counted from 0")
    return device


def check_answer(answer: object, xt: Tensor) -> Tensor:
    """The latents that a callback asks to go on from: its answer's, or xt as it is.

    Raises ValueError unless answer is None or {"latents": a tensor like xt}.
    """
    answer = {} if answer is None else answer
    if not isinstance(answer, Mapping) or answer.keys() - {"latents"}:
        given = list(answer) if isinstance(answer, Mapping) else type(answer).__name__
        raise ValueError(f'callback_on_step_end returned {given}: expected None or {{"latents": tensor}}')
    latents = answer.get("latents", xt)
    if not isinstance(latents, Tensor) or latents.shape != xt.shape:
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"callback_on_step_end returned latents {shape}: expected {tuple(xt.shape)}")
    return latents


def call_back(callback: Callback, pipe: Any, step: Step, tableau: Tableau, names: Sequence[str]) -> None:
    """Shows a step to callback_on_step_end, and works its answer into the tensor the trajectory goes on from.

    names: "latents" or "x0". Raises ValueError for an answer that cannot be.
    """
    seen = {name: step.x0 if name == "x0" else step.xt for name in names}
    answer = callback(pipe, step.index, int(tableau.steps.t[step.index]), seen)
    step.xt.copy_(check_answer(answer, step.xt))


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """A seed an image: seed + i, those given, or drawn ones. Raises ValueError if a seed is out of range."""
    if seed is None:
        seed = secrets.randbits(32)  # as short as those that other programs take
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != count:
            raise ValueError(f"{len(seed)} seeds for {count} images: give one for each, or the first")
        for each in seed:
            options.check_seed(each)
        return list(seed)
    options.check_seed(seed, count)
    return [seed + index for index in range(count)]


def from_generator(generator: Generators, count: int, shape: Sequence[int]) -> tuple[Tensor, Noise]:
    """The first noise, (count, C, h, w), as diffusers draws it in float32, and the noise of the steps.

    generator: one for all images, or a list with one for each. Seeds of steps are drawn when first needed.
    Raises ValueError if there are not as many generators as images.
    """
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    if not isinstance(generator, torch.Generator) and len(generators) != count:
        raise ValueError(f"{len(generators)} generators for {count} images: give one for each, or one alone")
    rows = count // len(generators)
    xt = torch.cat(
        [torch.randn(rows, *shape, generator=each, device=each.device).cpu() for each in generators]
    )

    @cache
    def later() -> Noise:
        seeds = [torch.randint(2**62, (rows,), generator=each, device=each.device) for each in generators]
        return step_noise([int(seed) for row in seeds for seed in row], shape)

    return xt, lambda step: later()(step)


def first_noise(
    count: int,
    shape: Sequence[int],
    seed: int | Sequence[int] | None,
    generator: Generators | None,
    latents: Tensor | None,
    variation: Variation | None = None,
) -> tuple[Tensor, Noise, list[int] | None]:
    """The first noise (count, C, h, w), the noise of the steps, and the seeds (None with a generator).

    shape: (C, h, w). variation: all images have one seed, and go each to the noise of another, as
    AUTOMATIC1111's do. Raises ValueError for seeds that cannot be, and for latents that are no such batch.
    """
    if seed is not None and generator is not None:
        raise ValueError("give either seed or generator")
    if latents is not None and (tuple(latents.shape) != (count, *shape) or not latents.is_floating_point()):
        found = f"{tuple(latents.shape)} of {latents.dtype}"
        raise ValueError(f"latents are {found}: expected the first noise, {(count, *shape)} of floats")
    others = None if variation is None else others_of(variation, count, shape)
    if generator is not None:
        seeds, (xt, noise) = None, from_generator(generator, count, shape)
    else:
        alike = variation is not None and not isinstance(seed, Sequence)
        seeds = seeds_of(seed, 1) * count if alike else seeds_of(seed, count)
        xt, noise = start_noise(seeds, shape), step_noise(seeds, shape)
    xt = xt if latents is None else latents
    return (xt if variation is None or others is None else slerp(xt, others, variation[1])), noise, seeds


def others_of(variation: Variation, count: int, shape: Sequence[int]) -> Tensor:
    """The noise, (count, C, h, w), that a variation goes to. Raises ValueError for one that cannot be."""
    if not isinstance(variation, tuple | list) or len(variation) != 2:
        raise ValueError(f"variation={variation!r}: expected (seed, strength), such as (7, 0.2)")
    options.check_variation(None, variation[1])
    return start_noise(seeds_of(variation[0], count), shape)
