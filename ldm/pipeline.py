"""The pipeline: prompts in, pictures out, with the argument names of diffusers' StableDiffusionPipeline."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor

from autoencoder.vae import AutoencoderKL
from ldm import inputs, options, stock
from ldm.checkpoint import Undrawn, has_variant, load_model, save_model
from ldm.config import read_config, read_json, write_json
from ldm.context import Context
from ldm.devices import Movable, default_dtype
from ldm.guidance import classifier_free, conditional
from ldm.hub import find_folder
from ldm.noise import Noise
from ldm.requests import Request
from ldm.sample import Step, trajectory
from ldm.scheduler import Scheduler
from ldm.solvers import SOLVERS, Tableau
from ldm.unet import UNet
from ldm.variance import LearnedVariance, Predict
from text_encoder.clip import CLIPTextEncoder
from text_encoder.tokenizer import Tokenizer

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

log = logging.getLogger(__name__)

BUNDLED = Path(__file__).parent / "bundled"
DEFAULTS = "generation.json"  # beside model_index.json: the options that suit the model, see options.Defaults
OutputType = Literal["pil", "np", "pt", "latent"]
Callback = Callable[[Any, int, int, dict[str, Tensor]], "dict[str, Tensor] | None"]


class PipelineOutput(NamedTuple):
    """The pictures of a call, and what it decided."""

    images: Any  # PIL images; "np": (B, H, W, 3), "pt": (B, 3, H, W), both in [0, 1]; "latent": (B, C, h, w)
    seeds: list[int] | None  # of each image; None where a generator drew the noise
    cut: list[str]  # of each prompt, the end that did not fit the text encoder; "" where all did


def to_pil(images: Tensor) -> list[Image.Image]:
    """PIL images of (B, 3, H, W) in [0, 1]."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(each) for each in pixels]


FORMATS: dict[OutputType, Callable[[Tensor], Any]] = {
    "pil": to_pil,
    "np": lambda images: images.permute(0, 2, 3, 1).cpu().numpy(),
    "pt": lambda images: images,
    "latent": lambda latents: latents,
}


class LatentDiffusionPipeline(Movable):
    """Text-to-image latent diffusion. A call changes nothing here, so threads may share a pipeline."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextEncoder,
        tokenizer: Tokenizer,
        unet: UNet,
        scheduler: Scheduler,
        defaults: options.Defaults | None = None,
    ) -> None:
        """Raises ValueError if the parts do not fit each other."""
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.unet, self.scheduler = unet, scheduler
        self.defaults = defaults or options.Defaults()
        self._progress: dict[str, Any] = {}
        self.optimized = False
        stock.check_fit(vae, text_encoder, tokenizer, unet)
        options.check_choice("sampler", self.defaults.sampler or scheduler.solver, SOLVERS)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
        use_safetensors: bool = True,
        safety_checker: None = None,
    ) -> Self:
        """The pipeline of a folder in diffusers' layout, or of a hub id, on the CPU.

        dtype: None is bfloat16 where the hardware multiplies it, else float32. torch_dtype is its old name.
        variant: such as "fp16", for the parts that have it. The last two are for diffusers' scripts.
        Raises ValueError unless every part is whole, of a known class, and fits its configuration exactly.
        """
        if not use_safetensors:
            raise ValueError("use_safetensors=False: pickled weights can run any code and are never opened")
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype}: give one of them")
        chosen = dtype or torch_dtype
        folder = find_folder(path, variant)
        stock.check_index(folder)
        parts = [folder / name for name in stock.MODELS]
        variants = [variant if variant and has_variant(part, variant) else None for part in parts]
        if variant and not any(variants):
            raise ValueError(f"{folder} has no variant {variant!r} of any part")
        dtype = chosen or default_dtype(torch.device("cpu"))
        vae = load_model(AutoencoderKL, parts[0], dtype, variants[0])
        text_encoder = load_model(CLIPTextEncoder, parts[1], dtype, variants[1])
        unet = load_model(UNet, parts[2], dtype, variants[2])
        tokenizer = Tokenizer.from_folder(folder / "tokenizer")
        scheduler = Scheduler.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
        path = folder / DEFAULTS
        defaults = read_config(options.Defaults, read_json(path), path) if path.exists() else None
        pipe = cls(vae, text_encoder, tokenizer, unet, scheduler, defaults)
        pipe._dtype_by_device = chosen is None
        return pipe.to(memory_format=torch.channels_last)

    @classmethod
    def bundled(cls, *, dtype: torch.dtype | None = None) -> Self:
        """The small model that comes with this package. Raises ValueError if this installation has none."""
        if not BUNDLED.is_dir():
            raise ValueError("this installation carries no bundled model: name a folder or a hub id")
        return cls.from_pretrained(BUNDLED, dtype=dtype)

    @classmethod
    def from_diffusers(cls, pipe: StableDiffusionPipeline) -> Self:
        """This pipeline around the weights of diffusers', shared: a change in one is a change in both."""
        return cls(**stock.parts_of(pipe))

    def to_diffusers(self) -> StableDiffusionPipeline:
        """diffusers' pipeline around these weights, without a copy: a change in one is a change in both."""
        return stock.to_diffusers(self)

    def save_pretrained(self, folder: str | Path, variant: str | None = None) -> None:
        """Writes a folder that from_pretrained here and in diffusers reads; model_index.json comes last."""
        folder = Path(folder)
        if self._dtype_by_device and self.dtype != torch.float32:
            log.warning("the weights are saved as %s, as they were loaded here by default", self.dtype)
        for name in stock.MODELS:
            save_model(getattr(self, name), folder / name, variant=variant)
        self.tokenizer.save(folder / "tokenizer")
        write_json(folder / "scheduler/scheduler_config.json", stock.scheduler_json(self.scheduler.config))
        (folder / DEFAULTS).unlink(missing_ok=True)  # another model's
        if self.defaults != options.Defaults():
            write_json(folder / DEFAULTS, dataclasses.asdict(self.defaults))
        write_json(
            folder / "model_index.json", stock.model_index(stock.scheduler_class(self.scheduler.config))
        )

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name: LatentDiffusionPipeline(**pipe.components) is another one of the same parts."""
        return {
            name: getattr(self, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
        }

    def optimize(self) -> Self:
        """Switches on what is faster here and costs some seconds first; pictures differ by rounding alone.

        On a CPU, in float32: kernels in C++ that g++ compiles once for this machine; in bfloat16, where the
        CPU has AMX, one for attention. The process keeps the memory that it has used, for the next picture.
        On an accelerator: torch.compile, anew for every size and batch.
        Raises ValueError, which says why and what to do, where it cannot be had.
        """
        from ldm.optimize import optimize  # only who asks for it needs it

        optimize(self)
        self.optimized = True
        return self

    def set_progress_bar_config(self, **config: Any) -> None:
        """Options of the tqdm bar, such as disable=True. It is shown where stderr is a terminal."""
        self._progress = config

    def enable_xformers_memory_efficient_attention(self) -> None:
        """The UNet's attention by xformers alone. Raises ValueError, which says why, where it cannot run."""
        self.unet.set_attention_backend("xformers")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """The UNet's attention by xformers on CUDA where it can run, else torch's own: as from the start."""
        self.unet.set_attention_backend("auto")

    def enable_vae_slicing(self) -> None:
        """Nothing is left to do: images are always decoded one at a time."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{name}: {stock.ABSENT.get(name, 'a LatentDiffusionPipeline has no such attribute')}"
        )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], clip_skip: int | None = None) -> Tensor:
        """The context of prompts, (B, N, D), for prompt_embeds. clip_skip: leaves out so many last layers.

        Each prompt is encoded alone: its numbers do not depend on the others.
        """
        options.check_clip_skip(clip_skip or 0)
        with Undrawn():
            encoder = self.text_encoder.drop_layers(clip_skip) if clip_skip else self.text_encoder
        with self._present(self.text_encoder):
            unique = {prompt: encoder(self.tokenizer([prompt]).to(self.device)) for prompt in set(prompts)}
        return torch.cat([unique[prompt] for prompt in prompts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) float32 in [0, 1], each alone: none sees its mates.

        A decoder that overflows in half precision runs again in float32. Raises ValueError if that does too.
        """
        if not latents.isfinite().all():
            advice = "; use dtype=torch.float32" if self.dtype != torch.float32 else ""
            raise ValueError(f"the UNet's answer in {self.dtype} is not finite{advice}")
        rows = latents.float().split(1)
        with self._present(self.vae):
            images = [self.vae.decode(row) for row in rows]
            wrong = [index for index, image in enumerate(images) if not image.isfinite().all()]
            if wrong and self.vae.dtype != torch.float32:
                log.warning("the autoencoder overflows in %s: decoding in float32", self.vae.dtype)
                exact = copy.deepcopy(self.vae).float()
                for index in wrong:  # the others keep what they get alone
                    images[index] = exact.decode(rows[index])
        if not all(image.isfinite().all() for image in images):
            raise ValueError("the decoded image is not finite: are the autoencoder's weights whole?")
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        *,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: inputs.Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        sampler: str | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PipelineOutput:
        """Pictures of prompts. Arguments that are None take the model's defaults.

        seed: of the first image; image i has seed + i, or give one for each.
        generator: draws the first noise as in diffusers. latents: that noise, (B, C, h, w) standard normal.
        guidance_interval: (low, high) in log(alpha / sigma), no guidance outside. sampler: a name in SOLVERS.
        callback_on_step_end: called with (pipeline, step, t, tensors) after each model call; tensors may be
        "latents" and "x0", the clean latents the model sees; it may return {"latents": ...} to go on from.
        Raises ValueError, with what is valid, for whatever cannot be.
        """
        scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        rescale = self.defaults.guidance_rescale if guidance_rescale is None else guidance_rescale
        options.check_guidance(scale, rescale, guidance_interval)
        options.check_choice("output_type", output_type, FORMATS)
        for name in callback_on_step_end_tensor_inputs:
            options.check_choice("callback_on_step_end_tensor_inputs", name, ("latents", "x0"))
        tableau = self.tableau(num_inference_steps, sampler)
        context, uncond, cut = self._contexts(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images_per_prompt, clip_skip
        )
        if scale <= 1 and (negative_prompt or negative_prompt_embeds is not None):
            log.warning("the negative prompt has no effect without guidance: guidance_scale=%s", scale)
        shape, kind = self._latent_shape(height, width, latents), self.scheduler.prediction
        xt, noise, seeds = inputs.first_noise(len(context), shape, seed, generator, latents)
        predict, noise = self._heard(noise, tableau, sampler)
        denoise = conditional(predict, context, kind)
        if scale > 1:
            denoise = classifier_free(predict, context, uncond, scale, kind, rescale, guidance_interval)
        run = trajectory(self._present(self.unet)(denoise), xt.to(self.device).float(), tableau, noise)
        for step in self._bar(run, len(tableau.steps)):
            xt = step.xt
            if callback_on_step_end is not None:
                given = {key: step.x0 if key == "x0" else xt for key in callback_on_step_end_tensor_inputs}
                answer = callback_on_step_end(self, step.index, int(tableau.steps.t[step.index]), given)
                xt.copy_(inputs.check_answer(answer, xt))  # the trajectory goes on from this tensor
        images = FORMATS[output_type](xt if output_type == "latent" else self.decode(xt))
        return PipelineOutput(images, seeds, cut) if return_dict else (images, None)  # type: ignore[return-value]

    def each(
        self, requests: Iterable[Request], batch_size: int | None = None
    ) -> Iterator[tuple[Request, Image.Image]]:
        """Pictures as they are drawn: of each request, with all that it leaves open settled, a PIL image.

        Alike requests are drawn together, whatever their order. batch_size: how many; None suits the device.
        A picture is that of a call of its own with this seed, to 1/255; with batch_size=1 bit for bit.
        Raises ValueError for what cannot be, before anything is drawn.
        """
        from ldm import many  # which imports this module

        return many.each(self, requests, batch_size)

    def tableau(self, steps: int | None = None, sampler: str | None = None) -> Tableau:
        """The table that a call with these options follows. Raises ValueError if there is none."""
        steps = self.defaults.num_inference_steps if steps is None else steps
        sampler = sampler or self.defaults.sampler or self.scheduler.solver
        options.check_steps(steps)
        options.check_choice("sampler", sampler, SOLVERS)
        return self.scheduler.tableau(steps, sampler)

    def _contexts(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        embeds: Tensor | None,
        negative_embeds: Tensor | None,
        images: int,
        clip_skip: int | None,
    ) -> tuple[Tensor, Tensor, list[str]]:
        """context and uncond, (B, N, D) with a row an image, and what was cut of each prompt."""
        encode = functools.partial(self.encode_prompts, clip_skip=clip_skip)
        width = self.unet.config.cross_attention_dim
        if negative_prompt is None and negative_embeds is None:
            negative_prompt = ""
        prompts = inputs.prompt_list(prompt, "prompt")
        negatives = inputs.prompt_list(negative_prompt, "negative_prompt")
        given: Sequence[str] | Tensor | None = prompts if embeds is None else embeds
        options.check_count(images, 1 if given is None else len(given))
        context = inputs.context_of(prompts, embeds, encode, (None, None, width), "prompt")
        # whole also with clip_skip, as in diffusers
        uncond = inputs.context_of(
            negatives, negative_embeds, self.encode_prompts, context.shape, "negative_prompt"
        )
        cut = inputs.what_is_cut(prompts or [], self.tokenizer, "prompt")
        inputs.what_is_cut(negatives or [], self.tokenizer, "negative prompt")
        context, uncond = (
            each.to(self.device).repeat_interleave(images, dim=0) for each in (context, uncond)
        )
        return context, uncond, cut

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that suit the model: its defaults', or what the UNet was trained on."""
        factor, trained = self.vae.downsample_factor, self.unet.config.sample_size or 64
        h, w = (trained, trained) if isinstance(trained, int) else trained
        return self.defaults.height or h * factor, self.defaults.width or w * factor

    def _latent_shape(
        self, height: int | None, width: int | None, latents: Tensor | None
    ) -> tuple[int, int, int]:
        """(C, h, w) of an image: of the size asked for, else that of latents, else what suits the model.

        Raises ValueError for a size that cannot be.
        """
        factor, usual = self.vae.downsample_factor, self.default_size
        if latents is not None and latents.ndim == 4:
            usual = (latents.shape[2] * factor, latents.shape[3] * factor)
        height = usual[0] if height is None else height
        width = usual[1] if width is None else width
        options.check_size(height, width, factor)
        return self.unet.config.in_channels, height // factor, width // factor

    def _heard(self, noise: Noise, tableau: Tableau, sampler: str | None) -> tuple[Predict, Noise]:
        """The UNet's prediction, and a run's noise: DDPM's is as loud as the UNet says, where it does."""
        if self.unet.config.out_channels != 2 * self.unet.config.in_channels:
            return self._predict, noise
        learned = LearnedVariance(self._predict)
        asked = self.scheduler.learns_variance(sampler or self.defaults.sampler)
        return learned, learned.louder(noise, tableau.steps) if asked else noise

    def _predict(self, xt: Tensor, t: Tensor, context: Tensor | Context) -> Tensor:
        """The UNet's answer: the prediction, (B, C, h, w), and the variance that some give beside it."""
        return self.unet(xt.contiguous(memory_format=torch.channels_last), t, context)

    def _bar(self, steps: Iterable[Step], total: int) -> Iterable[Step]:
        """The steps, with a progress bar where stderr is a terminal."""
        from tqdm import tqdm  # 40 ms

        return tqdm(steps, total=total, **{"disable": None, **self._progress})
