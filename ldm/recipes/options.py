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
NOISE_LEVEL = 20  # on an upscaler's small picture, where a call names none: diffusers'
GUIDANCES = ("cfg", "apg")  # by name: classifier-free, and adaptive projected; see ldm.diffusion.guidance
FORMS = ("score", "mean")  # of classifier guidance: the names in ldm.diffusion.classifier.GAINS
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
    class_names: tuple[str, ...] = ()  # of a model with classes, in the order of their numbers

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


def check_strength(strength: float, steps: int | None = None, *, name: str = "strength") -> None:
    """Raises ValueError unless strength is above 0 and at most 1, and leaves a step of these."""
    if not _number(strength) or not 0 < strength <= 1:
        raise ValueError(f"{name}={strength!r}: expected above 0 (nothing changes) to 1 (starts from noise)")
    if steps is not None and not int(steps * strength):
        least = math.ceil(1000 / steps) / 1000
        raise ValueError(f"{name}={strength} leaves none of {steps} steps: use {least:g} or more")


def usual_strength(strength: float | None, *, masked: bool) -> float:
    """The strength where it is given, else what diffusers' pipelines take."""
    return (1.0 if masked else 0.8) if strength is None else strength


def check_start(image: Any, mask: Any, strength: Any, *, mask_name: str = "mask") -> None:
    """Raises ValueError for a mask or a strength without a picture, where they would have no effect."""
    for name, value in ((mask_name, mask), ("strength", strength)):
        if image is None and value is not None:
            raise ValueError(f"{name} has no effect without a picture to start from: give image")
    if strength is not None:
        check_strength(strength)


def check_mask_shape(mask: tuple[int, int], image: tuple[int, int]) -> None:
    """Raises ValueError unless a mask has the shape of its picture, to a pixel, whatever their sizes.

    mask, image: width and height, in pixels.
    """
    (wide, high), (w, h) = mask, image
    if abs(high * w / wide - h) > 1 and abs(wide * h / high - w) > 1:
        raise ValueError(
            f"the mask is {wide}x{high} and the image {w}x{h}: expected one shape, no mask is stretched"
        )


def check_extend(sides: tuple[int, int, int, int]) -> None:
    """Raises ValueError unless these are pixels at left, top, right and bottom, some of them above 0."""
    fits = isinstance(sides, tuple | list) and len(sides) == 4
    if not fits or not all(_whole(side) and 0 <= side <= MAX_SIDE for side in sides) or not any(sides):
        raise ValueError(f"extend={sides!r}: expected pixels to add at left, top, right, bottom: 0 0 16 0")


def check_together(values: Mapping[str, Any]) -> None:
    """Raises ValueError for options of a start, by Recipe's names, that exclude or need each other."""
    image, mask, extend = (values.get(name) for name in ("image", "mask", "extend"))
    check_start(image, mask, values.get("strength"))
    if extend is not None and (image is None or mask is not None):
        why = "needs the picture: give image" if image is None else "makes a mask itself: leave out mask"
        raise ValueError(f"extend {why}")
    if values.get("two_pass") is not None and image is not None:
        raise ValueError("two_pass draws its own picture to start from: leave out image, or two_pass")
    if values.get("first_size") is not None and values.get("two_pass") is None:
        raise ValueError("first_size has no effect without two_pass, such as 0.5")
    if values.get("variation_seed") is not None and not values.get("variation_strength"):
        raise ValueError("variation_seed has no effect without variation_strength, such as 0.2")


def check_variation(seed: int | None, strength: float, count: int = 1) -> None:
    """Raises ValueError unless strength is 0 to 1, and seed (None: to be drawn) can be one with count."""
    if not _number(strength) or not 0 <= strength <= 1:
        raise ValueError(
            f"variation_strength={strength!r}: expected 0 (the seed's own picture) to 1 (another's)"
        )
    if seed is not None:
        check_seed(seed, count)


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


def check_noise_level(level: int, most: int) -> None:
    """Raises ValueError unless level, of the noise on an upscaler's small picture, is from 0 to most."""
    if not _whole(level) or not 0 <= level <= most:
        raise ValueError(f"noise_level={level!r}: expected a whole number from 0 to {most}; 20 is usual")


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


def check_classifier(scale: float, form: str) -> None:
    """Raises ValueError unless scale is 0 to MAX_GUIDANCE and form one of FORMS."""
    if not _number(scale) or not 0 <= scale <= MAX_GUIDANCE:
        raise ValueError(f"classifier_scale={scale!r}: expected a number from 0 (none) to 100")
    check_choice("classifier_form", form, FORMS)


def check_guiding(values: Mapping[str, Any]) -> None:
    """Raises ValueError unless the guidance that is asked for can be, and all of it has an effect."""
    name, limit, worse = (values.get(key) for key in ("guidance", "threshold", "worse"))
    if name is not None:
        check_choice("guidance", name, GUIDANCES)
    if limit is not None and (not _number(limit) or not 0 < limit <= MAX_GUIDANCE):
        raise ValueError(f"threshold={limit!r}: expected above 0, in deviations of the latents; 3 is usual")
    named = "guidance=apg" if name == "apg" else f"worse={worse!r}"
    if name == "apg" and worse is not None:
        raise ValueError(f"guidance=apg and worse={worse!r}: two ways to guide, leave out one of them")
    if (name == "apg" or worse is not None) and values.get("guidance_rescale"):
        raise ValueError(f"guidance_rescale has no effect with {named}: leave it out")
    if worse is not None and values.get("negative_prompt"):
        raise ValueError(f"negative_prompt has no effect with {named}, which asks both UNets for the prompt")


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
    across, down = values.get("first_size") or (64, 64)
    check_size(down, across)
    check_count(values.get("num_images", 1))
    check_seed(values.get("seed", 0), values.get("num_images", 1))
    check_clip_skip(values.get("clip_skip", 0))
    check_weighting(values.get("prompt_weighting"))
    for name in ("strength", "two_pass"):
        if values.get(name) is not None:
            check_strength(values[name], name=name)
    if values.get("extend") is not None:
        check_extend(values["extend"])
    seed, strength = values.get("variation_seed"), values.get("variation_strength") or 0
    check_variation(seed, strength, values.get("num_images", 1))
    check_chunks(values.get("chunks"))
    check_quantization(values.get("quantize"))
    if values.get("upscale_noise") is not None:
        check_noise_level(values["upscale_noise"], MAX_STEPS - 1)  # each model knows fewer
        if values.get("upscaler") is None:
            raise ValueError("upscale_noise has no effect without an upscaler: give --upscale, too")
    check_guiding(values)
    check_classifier(values.get("classifier_scale", 1), values.get("classifier_form", "score"))


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raises ValueError, with those that are, unless value is one of the known strings."""
    if value not in list(known):
        raise ValueError(f"{name}={value!r} is unknown: expected one of {', '.join(known)}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
