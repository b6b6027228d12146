"""What a picture may be asked for: one set of checks for Python and command line, and a model's own defaults.

Imports no torch, so that a command line answers at once to what cannot be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_SIDE = 4096  # pixels
MAX_STEPS = 1000  # the training timesteps of every model of this family
MAX_IMAGES = 256  # of one call
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 100.0
WEIGHTINGS = ("a1111", "comfy")  # the names in text_encoder.prompt.WEIGHTINGS
QUANTIZATIONS = ("int8", "fp8")
MAX_CHUNKS = 64  # of a prompt: 4,800 of CLIP's tokens
MAX_PROMPT = 80_000  # characters: a recipe with two of them, escaped, is no longer than what --from reads


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a call uses for options it does not name: diffusers' values, or a folder's generation.json."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    sampler: str | None = None  # None: what the scheduler's config.json names
    height: int | None = None  # pixels; None: the size the UNet was trained at
    width: int | None = None

    def __post_init__(self) -> None:
        check_steps(self.num_inference_steps)
        check_guidance(self.guidance_scale, self.guidance_rescale)


@dataclass(frozen=True)
class Framing:
    """How SDXL frames a picture: pairs of pixels, vertical first (Podell et al. 2023, section 2.2).

    Raises ValueError unless each is None or such a pair.
    """

    original_size: tuple[int, int] | None = (
        None  # as of a picture before it was scaled: small ones are blurred
    )
    crops_coords_top_left: tuple[int, int] | None = None  # cut off above and to the left; None: nothing
    target_size: tuple[int, int] | None = None  # None, as for original_size: the picture's own

    def __post_init__(self) -> None:
        for name, pair in vars(self).items():
            fits = isinstance(pair, tuple | list) and len(pair) == 2
            if pair is not None and not (fits and all(_whole(side) and 0 <= side <= 2**16 for side in pair)):
                raise ValueError(f"{name}={pair!r}: expected two whole numbers of pixels, vertical first")


def check_steps(steps: int) -> None:
    """Raises ValueError unless steps is a whole number from 1 to MAX_STEPS."""
    if not _whole(steps) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps={steps!r}: expected a whole number from 1 to {MAX_STEPS}; 20 to 50 is usual")


def check_guidance(scale: float, rescale: float = 0.0, interval: tuple[float, float] | None = None) -> None:
    """Raises ValueError unless scale is 0 or 1 to MAX_GUIDANCE, rescale 0 to 1, and interval not empty."""
    if not _number(scale) or not (scale == 0 or 1 <= scale <= MAX_GUIDANCE):
        usual = "from 1 (no guidance; so is 0) to 100; 5 to 9 is usual"
        raise ValueError(f"guidance_scale={scale!r}: expected a number {usual}")
    if not _number(rescale) or not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale={rescale!r}: expected a number from 0 (off) to 1; 0.7 is usual")
    if interval is not None:
        pair = isinstance(interval, tuple | list) and len(interval) == 2
        pair = pair and all(_number(end) or end in (-math.inf, math.inf) for end in interval)
        if not pair or not interval[0] < interval[1]:
            raise ValueError(
                f"guidance_interval={interval!r}: expected (low, high) in log(alpha / sigma), low < high"
            )


def check_size(height: int, width: int, multiple: int = 1) -> None:
    """Raises ValueError unless both sides, in pixels, are multiples that a picture can have."""
    low = max(multiple, 8)
    for name, side in (("height", height), ("width", width)):
        if not _whole(side) or not low <= side <= MAX_SIDE:
            raise ValueError(f"{name}={side!r}: expected a whole number of pixels from {low} to {MAX_SIDE}")
        if side % multiple:
            near = side // multiple * multiple
            also = f" or {near + multiple}" if near + multiple <= MAX_SIDE else ""
            raise ValueError(f"{name}={side} is not a multiple of {multiple}: use {near}{also}")


def check_count(count: int, prompts: int = 1) -> None:
    """Raises ValueError unless count images of each prompt are 1 to MAX_IMAGES together."""
    if not _whole(count) or not 1 <= count * prompts <= MAX_IMAGES:
        of = f" for each of {prompts} prompts" if prompts > 1 else ""
        raise ValueError(f"num_images={count!r}{of}: expected 1 to {MAX_IMAGES} images in a call")


def check_batch_size(size: int) -> None:
    """Raises ValueError unless size is a whole number from 1 to MAX_IMAGES."""
    if not _whole(size) or not 1 <= size <= MAX_IMAGES:
        raise ValueError(f"batch_size={size!r}: expected 1 to {MAX_IMAGES} pictures drawn together")


def check_seed(seed: int, count: int = 1) -> None:
    """Raises ValueError unless seed and the count - 1 after it, one an image, are 0 to 2**63 - 1."""
    if not _whole(seed) or not 0 <= seed <= MAX_SEED - (count - 1):
        raise ValueError(
            f"seed={seed!r}: expected a whole number from 0 to 2**63 - {count}; without it one is drawn"
        )


def check_prompt(prompt: str, name: str = "prompt") -> None:
    """Raises ValueError unless prompt is a string of valid Unicode, of at most MAX_PROMPT characters."""
    if not isinstance(prompt, str):
        raise ValueError(f"{name} is a {type(prompt).__name__}: expected a string or a list of strings")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"{name} has {len(prompt)} characters: expected at most {MAX_PROMPT}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        where = f"at character {error.start}: {prompt[error.start]!a}"
        raise ValueError(f"{name} is not valid Unicode {where}") from None


def check_clip_skip(count: int) -> None:
    """Raises ValueError unless count is a whole number from 0; how many there are, the text encoder knows."""
    if not _whole(count) or count < 0:
        raise ValueError(f"clip_skip={count!r}: expected a number of layers to leave out, 0 or more")


def check_weighting(name: str | None) -> None:
    """Raises ValueError unless name is None or one of WEIGHTINGS."""
    if name is not None:
        check_choice("prompt_weighting", name, WEIGHTINGS)


def check_quantization(name: str | None) -> None:
    """Raises ValueError unless name is None or one of QUANTIZATIONS."""
    if name is not None:
        check_choice("quantize", name, QUANTIZATIONS)


def check_chunks(count: int | None) -> None:
    """Raises ValueError unless count is None or a whole number from 1 to MAX_CHUNKS."""
    if count is not None and (not _whole(count) or not 1 <= count <= MAX_CHUNKS):
        raise ValueError(f"chunks={count!r}: expected 1 to {MAX_CHUNKS} times what the text encoder reads")


def check_request(values: Mapping[str, Any]) -> None:
    """Raises ValueError unless these options of a picture, by Recipe's names, can be; what is absent can."""
    for name in ("prompt", "negative_prompt"):
        check_prompt(values.get(name, ""), name)
    check_steps(values.get("steps", 1))
    interval = values.get("guidance_interval")
    check_guidance(values.get("guidance_scale", 1), values.get("guidance_rescale", 0), interval)
    if interval is not None and math.inf in map(abs, interval):
        raise ValueError(f"guidance_interval={interval!r}: a recipe holds no infinity; say -99 or 99")
    check_size(values.get("height", 64), values.get("width", 64))
    check_count(values.get("num_images", 1))
    check_seed(values.get("seed", 0), values.get("num_images", 1))
    check_clip_skip(values.get("clip_skip", 0))
    check_weighting(values.get("prompt_weighting"))
    check_chunks(values.get("chunks"))
    check_quantization(values.get("quantize"))


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raises ValueError, with those that are, unless value is one of the known strings."""
    if value not in list(known):
        raise ValueError(f"{name}={value!r} is unknown: expected one of {', '.join(known)}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
