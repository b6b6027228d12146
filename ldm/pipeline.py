"""The pipeline: prompts in, pictures out, with the argument names of diffusers' StableDiffusionPipeline."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image
from torch import Tensor

from autoencoder.vae import AutoencoderKL
from ldm import inputs, options, stock
from ldm.adapters.adaptable import Adaptable
from ldm.context import Context
from ldm.devices import default_dtype
from ldm.formats.single_file import SingleFiles
from ldm.guidance import Guidance, choose
from ldm.hub import find_folder
from ldm.noise import Noise
from ldm.outputs import FORMATS, OutputType, PipelineOutput
from ldm.parts import read_parts, write_parts
from ldm.prompting import Prompting
from ldm.requests import Request
from ldm.sample import Denoiser, Step, trajectory
from ldm.scheduler import Scheduler
from ldm.solvers import SOLVERS, Tableau
from ldm.texts import OneText, TwoTexts, texts_of
from ldm.unet import UNet
from ldm.variance import LearnedVariance, Predict
from text_encoder.clip import CLIPTextEncoder
from text_encoder.tokenizer import Tokenizer

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from torch import nn

log = logging.getLogger(__name__)

BUNDLED = Path(__file__).parent / "bundled"


class LatentDiffusionPipeline(SingleFiles, Prompting, Adaptable):
    """Text-to-image latent diffusion. A call changes nothing here, so threads may share a pipeline."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextEncoder,
        tokenizer: Tokenizer,
        unet: UNet,
        scheduler: Scheduler,
        defaults: options.Defaults | None = None,
        *,
        text_encoder_2: CLIPTextEncoder | None = None,
        tokenizer_2: Tokenizer | None = None,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        """The last three are SDXL's. Raises ValueError if the parts do not fit each other."""
        super().__init__()
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.unet, self.scheduler = unet, scheduler
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.defaults = defaults or self.texts.defaults
        self._progress: dict[str, Any] = {}
        stock.check_fit(vae, self.texts, unet)
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
        dtype = chosen or default_dtype(torch.device("cpu"))
        pipe = cls(**read_parts(find_folder(path, variant), dtype, variant))
        pipe._dtype_by_device = chosen is None
        return pipe.to(memory_format=torch.channels_last)

    @classmethod
    def bundled(cls, *, dtype: torch.dtype | None = None) -> Self:
        """The small model that comes with this package. Raises ValueError if this installation has none."""
        if not BUNDLED.is_dir():
            raise ValueError("this installation carries no bundled model: name a folder or a hub id")
        return cls.from_pretrained(BUNDLED, dtype=dtype)

    @classmethod
    def from_diffusers(cls, pipe: StableDiffusionPipeline | StableDiffusionXLPipeline) -> Self:
        """This pipeline around the weights of diffusers', shared: a change in one is a change in both."""
        return cls(**stock.parts_of(pipe))

    def to_diffusers(self) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """diffusers' pipeline around these weights, without a copy: a change in one is a change in both."""
        return stock.to_diffusers(self)

    def save_pretrained(self, folder: str | Path, variant: str | None = None) -> None:
        """Writes a folder that from_pretrained here and in diffusers reads; model_index.json comes last."""
        if self._applied.state.shares():
            log.warning("the weights are saved with the adapters that are in them")
        if self._dtype_by_device and self.dtype != torch.float32:
            log.warning("the weights are saved as %s, as they were loaded here by default", self.dtype)
        write_parts(self, Path(folder), variant)

    @property
    def texts(self) -> OneText | TwoTexts:
        """How prompts become what the UNet is told: by one text encoder, or by SDXL's two."""
        return texts_of(
            *(self.text_encoder, self.tokenizer, self.text_encoder_2, self.tokenizer_2),
            self.force_zeros_for_empty_prompt,
        )

    @property
    def models(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        """The parts with weights."""
        return tuple(getattr(self, name) for name in self.texts.layout.models)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name: LatentDiffusionPipeline(**pipe.components) is another one of the same parts."""
        layout = self.texts.layout
        return {name: getattr(self, name) for name in (*layout.parts, *layout.settings)}

    def set_progress_bar_config(self, **config: Any) -> None:
        """Options of the tqdm bar, such as disable=True. It is shown where stderr is a terminal."""
        self._progress = config

    def enable_vae_slicing(self) -> None:
        """Nothing is left to do: images are always decoded one at a time."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{name}: {stock.ABSENT.get(name, 'a LatentDiffusionPipeline has no such attribute')}"
        )

    @torch.no_grad()
    def encode_prompts(
        self,
        prompts: Sequence[inputs.Prompt],
        clip_skip: int | None = None,
        prompt_weighting: str | None = None,
    ) -> Tensor | Context:
        """The context of prompts, (B, N, D), for prompt_embeds; of SDXL a Context, with each text as a whole.

        clip_skip: leaves out so many last layers. prompt_weighting: as of a call. None in the place of a
        prompt: nothing is said. Each prompt is encoded alone: its numbers do not depend on the others.
        """
        told = self._encode(prompts, clip_skip, prompt_weighting)
        return told.embeddings if told.pooled is None else told

    def _encode(
        self, prompts: Sequence[inputs.Prompt], clip_skip: int | None = None, weighting: str | None = None
    ) -> Context:
        options.check_clip_skip(clip_skip or 0)
        return self.texts.encode(prompts, clip_skip or 0, weighting, self.device, self._present)

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
        guidance: Guidance | None = None,
        negative_prompt: str | Sequence[inputs.Prompt] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: inputs.Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | Context | None = None,
        negative_prompt_embeds: Tensor | Context | None = None,
        clip_skip: int | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        prompt_weighting: str | None = None,
        strict: bool = False,
        sampler: str | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: inputs.Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PipelineOutput:
        """Pictures of prompts. Arguments that are None take the model's defaults.

        seed: of the first image; image i has seed + i, or give one for each.
        generator: draws the first noise as in diffusers. latents: that noise, (B, C, h, w) standard normal.
        original_size, crops_coords_top_left, target_size: for SDXL alone, see options.Framing.
        guidance_interval: (low, high) in log(alpha / sigma), no guidance outside. sampler: a name in SOLVERS.
        guidance: another than classifier_free, such as apg: see ldm.guidance.
        prompt_weighting: "a1111" or "comfy" reads "a (red:1.3) fox". strict: no warnings, but ValueErrors.
        callback_on_step_end: called with (pipeline, step, t, tensors) after each model call; tensors may be
        "latents" and "x0", the clean latents the model sees; it may return {"latents": ...} to go on from.
        Raises ValueError, with what is valid, for whatever cannot be.
        """
        scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        options.check_guidance(scale, guidance_rescale or 0.0, guidance_interval)
        options.check_choice("output_type", output_type, FORMATS)
        framing = options.Framing(original_size, crops_coords_top_left, target_size)
        tableau = self.tableau(num_inference_steps, sampler)
        given = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        told = self._heed(*given, prompt_weighting, scale, strict)
        context, uncond = self._contexts(*given, num_images_per_prompt, clip_skip, prompt_weighting)
        shape, kind = self._latent_shape(height, width, latents), self.scheduler.prediction
        h, w = (side * self.vae.downsample_factor for side in shape[1:])
        context, uncond = (self.texts.framed(each, (h, w), framing) for each in (context, uncond))
        xt, noise, seeds = inputs.first_noise(len(context), shape, seed, generator, latents)
        predict, noise = self._heard(noise, tableau, sampler)
        guide = choose(guidance, guidance_rescale, self.defaults.guidance_rescale, guidance_interval)
        denoise = guide(predict, context, uncond, max(scale, 1), kind)
        xt = self._run(denoise, xt, tableau, noise, callback_on_step_end, callback_on_step_end_tensor_inputs)
        images = FORMATS[output_type](xt if output_type == "latent" else self.decode(xt))
        return PipelineOutput(images, seeds, *told) if return_dict else (images, None)  # type: ignore[return-value]

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

    def _run(
        self,
        denoise: Denoiser,
        xt: Tensor,
        tableau: Tableau,
        noise: Noise,
        callback: inputs.Callback | None,
        names: Sequence[str],
    ) -> Tensor:
        """The last latents of a run. The callback hears of each step, with the tensors of these names."""
        for name in names:
            options.check_choice("callback_on_step_end_tensor_inputs", name, ("latents", "x0"))
        run = trajectory(self._present(self.unet)(denoise), xt.to(self.device).float(), tableau, noise)
        for step in self._bar(run, len(tableau.steps)):
            xt = step.xt
            if callback is not None:
                inputs.call_back(callback, self, step, tableau, names)
        return xt

    def _contexts(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[inputs.Prompt] | None,
        embeds: Tensor | Context | None,
        negative_embeds: Tensor | Context | None,
        images: int,
        clip_skip: int | None,
        weighting: str | None,
    ) -> tuple[Context, Context]:
        """context and uncond, with a row an image."""
        whole = functools.partial(self._encode, weighting=weighting)
        encode = functools.partial(whole, clip_skip=clip_skip)
        width = self.unet.config.cross_attention_dim
        if negative_prompt is None and negative_embeds is None:
            negative_prompt = [None]
        prompts = inputs.prompt_list(prompt, "prompt")
        negatives = inputs.negative_list(negative_prompt)
        given: Sequence[str] | Tensor | Context | None = prompts if embeds is None else embeds
        options.check_count(images, 1 if given is None else len(given))
        context = inputs.context_of(prompts, embeds, encode, (None, None, width), "prompt")
        # whole also with clip_skip, as in diffusers
        uncond = inputs.context_of(
            negatives, negative_embeds, whole, context.embeddings.shape, "negative_prompt"
        )

        def an_image_each(rows: Tensor) -> Tensor:
            return rows.to(self.device).repeat_interleave(images, dim=0)

        return context.each(an_image_each), uncond.each(an_image_each)

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
