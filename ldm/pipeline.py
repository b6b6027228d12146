"""The pipeline: prompts in, pictures out, with the argument names of diffusers' StableDiffusionPipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image
from torch import Tensor

from autoencoder.vae import AutoencoderKL
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.noise import Noise
from ldm.diffusion.scheduler import LCM, Scheduler
from ldm.diffusion.solvers import SOLVERS, Tableau
from ldm.diffusion.variance import LearnedVariance
from ldm.drawing import classes, inputs
from ldm.drawing.base import Drawing
from ldm.drawing.canvas import Canvas, canvas_of, shown_canvas_of
from ldm.drawing.given import Given, Pictures
from ldm.drawing.outputs import FORMATS, OutputType, PipelineOutput
from ldm.drawing.texts import OneText, TwoTexts, texts_of
from ldm.formats import stock
from ldm.model.context import Context, Predict
from ldm.model.unet import UNet
from ldm.recipes import options
from ldm.recipes.requests import Request
from text_encoder.clip import CLIPTextEncoder
from text_encoder.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ldm.drawing.attention_maps import AttentionMaps

BUNDLED = Path(__file__).parent / "bundled"


class LatentDiffusionPipeline(Drawing):
    """Latent diffusion from text, and from pictures. A call changes nothing here: threads may share it.

    Arguments of a call that are None take the model's defaults.
    image: where to start, one for all or one each: PIL, or a tensor in [0, 1]. Without height and width its
    own size counts; it is scaled to another.
    mask_image: likewise; white is repainted, black kept bit for bit, grey blends.
    strength: above 0 to 1, how much of the run is done; 0.8 from a picture, and 1 with a mask.
    seed: of the first image; image i has seed + i, or give one for each.
    variation: (seed, strength): every image has the same seed, and goes by strength, 0 to 1, to the noise of
    another, which for image i is that seed + i, or one of a list.
    generator: draws the first noise as in diffusers. latents: that noise, (B, C, h, w) standard normal.
    original_size, crops_coords_top_left, target_size: for SDXL alone, see options.Framing.
    guidance_interval: (low, high) in log(alpha / sigma), no guidance outside. sampler: a name in SOLVERS.
    guidance: another than classifier_free, such as apg: see ldm.diffusion.guidance.
    class_labels: numbers or names, of a model with classes; one for all, or one for each prompt.
    prompt_weighting: "a1111" or "comfy" reads "a (red:1.3) fox". strict: no warnings, but ValueErrors.
    callback_on_step_end: called with (pipeline, step, t, tensors) after each model call; tensors may be
    "latents" and "x0", the clean latents the model sees; it may return {"latents": ...} to go on from.
    """

    layouts = stock.LAYOUTS

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
        self.defaults = defaults or self.stock_defaults
        stock.check_fit(vae, self.texts, unet)
        classes.check_names(self.defaults.class_names, unet.config.num_class_embeds)
        options.check_choice("sampler", self.defaults.sampler or scheduler.solver, SOLVERS)

    @classmethod
    def bundled(cls, *, dtype: torch.dtype | None = None) -> Self:
        """The small model that comes with this package. Raises ValueError if this installation has none."""
        if not BUNDLED.is_dir():
            raise ValueError("this installation carries no bundled model: name a folder or a hub id")
        return cls.from_pretrained(BUNDLED, dtype=dtype)

    @property
    def texts(self) -> OneText | TwoTexts:
        """How prompts become what the UNet is told: by one text encoder, or by SDXL's two."""
        return texts_of(
            *(self.text_encoder, self.tokenizer, self.text_encoder_2, self.tokenizer_2),
            self.force_zeros_for_empty_prompt,
        )

    @property
    def layout(self) -> stock.Layout:
        layout = self.texts.layout
        if stock.sees_a_mask(self.unet, self.vae):
            return stock.for_masks(layout)
        few = self.unet.config.time_cond_proj_dim is not None and self.scheduler.config["_class_name"] == LCM
        return stock.FEW_STEPS if few and layout is stock.SD else layout

    @property
    def stock_defaults(self) -> options.Defaults:
        if self.layout is stock.FEW_STEPS:
            return options.Defaults(num_inference_steps=4, guidance_scale=8.5)
        return self.texts.defaults

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        *,
        image: Pictures | None = None,
        mask_image: Pictures | None = None,
        strength: float | None = None,
        variation: inputs.Variation | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance: Guidance | None = None,
        negative_prompt: str | Sequence[inputs.Prompt] | None = None,
        class_labels: classes.Labels | None = None,
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
        """Pictures of prompts: what the arguments mean is told by the class.

        Raises ValueError, with what is valid, for whatever cannot be.
        """
        scale, guide = self._guide(guidance_scale, guidance_rescale, guidance_interval, guidance)
        options.check_choice("output_type", output_type, FORMATS)
        framing = options.Framing(original_size, crops_coords_top_left, target_size)
        start = Given.of(image, mask_image, strength)
        tableau = self.tableau(num_inference_steps, sampler, start.strength)
        given = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        told = self._heed(*given, prompt_weighting, scale, strict, start.notices(tableau))
        contexts = self._contexts(*given, num_images_per_prompt, clip_skip, prompt_weighting)
        size = self._size(height, width, latents, start)
        context, uncond = self._framed(*contexts, size, framing, class_labels, num_images_per_prompt)
        draw = len(context), self._latent_shape(size), seed, generator, latents, variation
        xt, noise, seeds = inputs.first_noise(*draw)
        canvas = self._canvas(start, len(context), size)
        predict, noise = self._heard(canvas.shown(self._predict), noise, tableau, sampler)
        denoise = canvas.kept(guide(predict, context, uncond, max(scale, 1), self.scheduler.prediction))
        xt = canvas.begin(xt, next(iter(tableau.steps)))
        xt = self._run(denoise, xt, tableau, noise, callback_on_step_end, callback_on_step_end_tensor_inputs)
        images = FORMATS[output_type](xt if output_type == "latent" else start.finished(self.decode(xt)))
        return PipelineOutput(images, seeds, *told) if return_dict else (images, None)  # type: ignore[return-value]

    def attention_maps(self, prompt: str | Sequence[str], **call: Any) -> AttentionMaps:
        """A call's pictures, and where each looks for each word of its prompt: ldm.drawing.attention_maps.

        call: options as of any call; the pictures are the same, bit for bit.
        Raises ValueError if the model does not look at the text.
        """
        from ldm.drawing.attention_maps import attention_maps  # few ask for it

        return attention_maps(self, prompt, **call)

    def each(
        self, requests: Iterable[Request], batch_size: int | None = None
    ) -> Iterator[tuple[Request, Image.Image]]:
        """Pictures as they are drawn: of each request, with all that it leaves open settled, a PIL image.

        Alike requests are drawn together, whatever their order. batch_size: how many; None suits the device.
        A picture is that of a call of its own with this seed, to 1/255; with batch_size=1 bit for bit.
        Raises ValueError for what cannot be, before anything is drawn.
        """
        from ldm.drawing import many  # which imports this module

        return many.each(self, requests, batch_size)

    def _framed(
        self,
        context: Context,
        uncond: Context,
        size: tuple[int, int],
        framing: options.Framing,
        labels: classes.Labels | None,
        images: int,
    ) -> tuple[Context, Context]:
        """Both, with sizes and classes, where this model is told them. images: of a prompt."""
        context, uncond = (self.texts.framed(each, size, framing) for each in (context, uncond))
        embeds = self.unet.config.num_class_embeds
        numbers = classes.labels_for(labels, embeds, self.defaults.class_names)
        return classes.classed(context, uncond, numbers, (embeds or 0) - 1, images)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that suit the model: its defaults', or what the UNet was trained on."""
        factor, trained = self.vae.downsample_factor, self.unet.config.sample_size or 64
        h, w = (trained, trained) if isinstance(trained, int) else trained
        return self.defaults.height or h * factor, self.defaults.width or w * factor

    def _size(
        self, height: int | None, width: int | None, latents: Tensor | None, start: Given
    ) -> tuple[int, int]:
        """Height and width: those asked for, else those of the picture or the latents, else what suits.

        Raises ValueError for a size that cannot be.
        """
        factor, usual = self.vae.downsample_factor, self.default_size
        if latents is not None and latents.ndim == 4:
            usual = (latents.shape[2] * factor, latents.shape[3] * factor)
        if height is None or width is None:
            usual = start.size or usual
        size = usual[0] if height is None else height, usual[1] if width is None else width
        options.check_size(*size, factor)
        return size

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of a picture of this height and width."""
        factor = self.vae.downsample_factor
        return self.vae.config.latent_channels, size[0] // factor, size[1] // factor

    def _canvas(self, given: Given, count: int, size: tuple[int, int]) -> Canvas:
        """What the run draws on. Raises ValueError for pictures that do not suit the model or the call."""
        make = shown_canvas_of if stock.sees_a_mask(self.unet, self.vae) else canvas_of
        return make(given, count, size, self.vae.downsample_factor, self.encode)

    def _heard(
        self, predict: Predict, noise: Noise, tableau: Tableau, sampler: str | None
    ) -> tuple[Predict, Noise]:
        """The UNet's prediction, and a run's noise: DDPM's is as loud as the UNet says, where it does."""
        if self.unet.config.out_channels != 2 * self.vae.config.latent_channels:
            return predict, noise
        learned = LearnedVariance(predict)
        asked = self.scheduler.learns_variance(sampler or self.defaults.sampler)
        return learned, learned.louder(noise, tableau.steps) if asked else noise

    def _predict(self, xt: Tensor, t: Tensor, context: Tensor | Context) -> Tensor:
        """The UNet's answer: the prediction, (B, C, h, w), and the variance that some give beside it."""
        return self.unet(xt.contiguous(memory_format=torch.channels_last), t, context)
