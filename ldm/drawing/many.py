"""Many pictures by one pipeline, in batches of alike requests: pictures a second, not seconds a picture.

A picture has the noise of its own seed and is decoded alone, so what it shows depends on no other. The size
of its batch changes the order in which some kernels add up: measured on a CPU in float32, 1e-5 of the latents
and so 1/255 of a pixel in some pictures. Batch mates and the place among them changed no bit there.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from ldm.drawing import classes
from ldm.drawing.given import Given
from ldm.drawing.inputs import seeds_of
from ldm.drawing.outputs import to_pil
from ldm.drawing.passes import calls_of, drawn
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes import options
from ldm.recipes.requests import Request, pack
from ldm.recipes.starts import Start, first_size, settle_start, start_of

MAX_BATCH = 64
PIXELS = 1 << 21  # of a batch on an accelerator: 8 pictures of 512x512
ON_CPU = 4  # pictures; for the bundled model 0.65 of the time of one by one, on one core; 8 gain no more

T = TypeVar("T")


def usual(pipe: LatentDiffusionPipeline) -> dict[str, Any]:
    """What a model takes for options that are left open, by Recipe's names."""
    height, width = pipe.default_size
    return {
        "steps": pipe.defaults.num_inference_steps,
        "guidance_scale": pipe.defaults.guidance_scale,
        "guidance_rescale": pipe.defaults.guidance_rescale,
        "sampler": pipe.defaults.sampler or pipe.scheduler.solver,
        "height": height,
        "width": width,
    }


def settle_requests(pipe: LatentDiffusionPipeline, requests: Mapping[str, Request]) -> list[Request]:
    """The requests with all that they leave open settled; without a seed, one is drawn.

    requests: by what an error calls them. Raises ValueError for what this model cannot do.
    """
    default, settled, known = usual(pipe), [], set()
    for where, request in requests.items():
        stated = {name: value for name, value in vars(request).items() if value is not None}
        try:
            if request.image is not None and None in (request.width, request.height, request.strength):
                settle_start(stated, start_of(stated).image)
            seeds = {"seed": seeds_of(request.seed, 1)[0]}
            if stated.get("variation_strength"):
                seeds["variation_seed"] = seeds_of(None, 1)[0]
            values = {**default, **seeds, "clip_skip": 0, "negative_prompt": "", **stated}
            size = values["width"], values["height"]
            if request.two_pass is not None and request.first_size is None:
                values["first_size"] = first_size(*size, pipe.default_size, pipe.vae.downsample_factor)
            settled.append(Request(**values))
            embeds, names = pipe.unet.config.num_class_embeds, pipe.defaults.class_names
            classes.labels_for(values.get("class_label"), embeds, names)
            if settled[-1].alike not in known:
                known.add(settled[-1].alike)
                options.check_size(values["height"], values["width"], pipe.vae.downsample_factor)
                calls_of(pipe, settled[-1])
                if values["clip_skip"]:
                    pipe.texts.check_clip_skip(values["clip_skip"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return settled


def batch_size_for(pipe: LatentDiffusionPipeline, batch_size: int | None) -> Callable[[Request], int]:
    """How many pictures like a settled request are drawn together: batch_size, or what suits the device.

    Raises ValueError unless batch_size is None or 1 to MAX_IMAGES.
    """
    if batch_size is not None:
        options.check_batch_size(batch_size)
        return lambda request: batch_size
    if pipe.device.type == "cpu":
        return lambda request: ON_CPU
    return lambda request: min(max(PIXELS // (request.height * request.width), 1), MAX_BATCH)  # type: ignore[operator]


def each(
    pipe: LatentDiffusionPipeline, requests: Iterable[Request], batch_size: int | None
) -> Iterator[tuple[Request, Image.Image]]:
    """Of each request, settled, its picture: see LatentDiffusionPipeline.each."""
    settled = settle_requests(pipe, {f"request {place}": request for place, request in enumerate(requests)})
    batches = pack(settled, batch_size_for(pipe, batch_size))
    return draw_batches(pipe, [[settled[place] for place in batch] for batch in batches])


def draw_batches(
    pipe: LatentDiffusionPipeline, batches: Sequence[Sequence[Request]]
) -> Generator[tuple[Request, Image.Image]]:
    """Each settled request and its picture, batch by batch.

    Where it gains, a thread denoises the next batch while this one is decoded and the caller is at work.
    """
    stopped, quiet = threading.Event(), copy.copy(pipe)
    quiet.set_progress_bar_config(disable=True)  # of the copy alone: the caller's bar counts pictures

    def denoise(batch: Sequence[Request]) -> tuple[Sequence[Request], list[Start], Tensor]:
        starts = [start_of(vars(request)) for request in batch]
        return batch, starts, _latents(quiet, batch, starts, stopped)

    denoised: Iterator[tuple[Sequence[Request], list[Start], Tensor]] = map(denoise, batches)
    if overlaps(pipe):
        denoised = ahead(denoised, stopped)
    for batch, starts, latents in denoised:
        for request, start, row in zip(batch, starts, latents.split(1), strict=True):
            yield request, to_pil(Given.of(*start, None).finished(pipe.decode(row)))[0]


def overlaps(pipe: LatentDiffusionPipeline) -> bool:
    """Whether denoising beside decoding and writing gains time.

    A CPU has no idle part for it, and offloaded models would push each other out.
    """
    return pipe.device.type == "cuda" and not pipe.offloaded


def _latents(
    pipe: LatentDiffusionPipeline, batch: Sequence[Request], starts: Sequence[Start], stopped: threading.Event
) -> Tensor:
    """Latents (B, C, h, w) of alike requests. Raises InterruptedError within a step after stopped is set."""
    first = batch[0]

    def watch(*_: Any) -> None:
        if stopped.is_set():
            raise InterruptedError

    negatives = [request.negative_prompt or None for request in batch]
    pictures = {
        name: None if getattr(starts[0], name) is None else [getattr(start, name) for start in starts]
        for name in starts[0]._fields
    }
    others = [request.variation_seed for request in batch if request.variation_seed is not None]
    labels = [request.class_label for request in batch if request.class_label is not None]
    call = {
        **pictures,
        "prompt": [request.prompt for request in batch],
        "num_inference_steps": first.steps,
        "negative_prompt": negatives if any(negatives) else None,
        "guidance_scale": first.guidance_scale,
        "guidance_rescale": first.guidance_rescale,
        "guidance_interval": first.guidance_interval,
        "sampler": first.sampler,
        "seed": [request.seed for request in batch if request.seed is not None],
        "variation": (others, first.variation_strength) if first.variation_strength else None,
        "clip_skip": first.clip_skip or None,
        "prompt_weighting": first.prompt_weighting,
        "class_labels": labels or None,
        "output_type": "latent",
        "callback_on_step_end": watch,
        "callback_on_step_end_tensor_inputs": (),
    }
    return drawn(pipe, first, call).images


def ahead(items: Iterator[T], stopped: threading.Event) -> Iterator[T]:
    """The items in their order, each made by a thread while the caller is at work with the one before.

    stopped: set when the caller goes away or is interrupted, so that what is being made can end early.
    """
    end = object()
    with ThreadPoolExecutor(1) as thread:
        try:
            coming: Any = thread.submit(next, items, end)
            while (item := coming.result()) is not end:
                coming = thread.submit(next, items, end)
                yield item
        finally:
            stopped.set()
