"""The latent diffusion model as a task of `fit`: cached latents and captions in, a pipeline out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from autoencoder.vae import AutoencoderKL
from ldm.checkpoint import load_model
from ldm.noise import generator
from ldm.objective import WEIGHTS, diffusion_loss, stratified_timesteps
from ldm.options import Defaults
from ldm.pipeline import LatentDiffusionPipeline
from ldm.scheduler import Scheduler
from ldm.unet import UNet, UNetConfig
from text_encoder.clip import CLIPTextConfig, CLIPTextEncoder
from text_encoder.tokenizer import BYTES, Tokenizer
from train.config import to_mapping
from train.data import DataConfig, grid, spread
from train.latents import Latents
from train.loop import FitConfig
from train.plan import Draw, normal, uniform


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text encoder: a new small CLIP that learns with the UNet, or one of an existing pipeline."""

    train: bool = True  # together with the UNet; false: frozen
    path: str | None = None  # pipeline folder with text_encoder/ and tokenizer/; null: a new one
    width: int = 192  # channels of a new one; the UNet's cross_attention_dim
    layers: int = 4  # of a new one
    heads: int = 6  # of a new one
    vocab_size: int = 2048  # tokens at most, of a tokenizer trained on the captions
    max_length: int = 77  # tokens a prompt, start and end included, of a new one

    def __post_init__(self) -> None:
        if not self.train and self.path is None:
            raise ValueError(
                "text_encoder.train=false needs text_encoder.path: a new encoder has learnt nothing"
            )
        for name in ("width", "layers", "heads", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"text_encoder.{name}={getattr(self, name)}: expected 1 or more")
        if self.width % self.heads:
            raise ValueError(f"text_encoder.width={self.width} is not a multiple of heads={self.heads}")
        least = 2 * len(BYTES) + 2
        if self.vocab_size < least:
            raise ValueError(
                f"text_encoder.vocab_size={self.vocab_size}: bytes and special tokens alone are {least}"
            )
        if self.max_length < 3:
            raise ValueError(f"text_encoder.max_length={self.max_length}: start, end and a word are 3 tokens")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the UNet predicts, at which noise, and what each error weighs."""

    prediction: Literal["v", "eps", "x0"] = "v"
    zero_terminal_snr: bool = True  # the noisiest level is pure noise; not with eps
    weight: str = "min_snr"  # of the loss, by the noise level: a name in WEIGHTS of ldm/objective.py
    caption_dropout: float = 0.1  # of the samples get the empty prompt, which guidance needs

    def __post_init__(self) -> None:
        if self.prediction == "eps" and self.zero_terminal_snr:
            raise ValueError(
                "objective.prediction=eps with zero_terminal_snr: pure noise tells nothing, use v"
            )
        if self.weight not in WEIGHTS:
            raise ValueError(f"objective.weight={self.weight!r} is not one of {', '.join(WEIGHTS)}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(
                f"objective.caption_dropout={self.caption_dropout}: a fraction lies between 0 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe(FitConfig):
    """Training of a latent diffusion model."""

    autoencoder: str  # folder of a trained one, or the recipe (.yaml) that trains one on this data first
    latents: str | None = None  # folder that encode_latents.py wrote; null: computed into the run folder
    data: DataConfig = field(default_factory=DataConfig)
    text_encoder: TextConfig = field(default_factory=TextConfig)
    unet: UNetConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    prompts: tuple[str, ...] = ()  # of the pictures drawn while training; none: captions of the data
    export_dtype: Literal["float32", "float16"] = "float32"  # in which the exported weights are stored
    sampling: Defaults = field(default_factory=lambda: Defaults(num_inference_steps=25, guidance_scale=4.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_encoder.path is None and self.unet.cross_attention_dim != self.text_encoder.width:
            raise ValueError(
                f"unet.cross_attention_dim={self.unet.cross_attention_dim} and "
                f"text_encoder.width={self.text_encoder.width} differ"
            )
        if self.unet.out_channels != self.unet.in_channels:
            raise ValueError(
                f"unet.out_channels={self.unet.out_channels} and unet.in_channels={self.unet.in_channels} "
                "differ: no loss here trains more than the prediction"
            )
        if self.unet.num_class_embeds is not None:
            raise ValueError(
                f"unet.num_class_embeds={self.unet.num_class_embeds}: the data has no classes, use null"
            )


class LatentDiffusion:
    """Trains a UNet, and with it a text encoder if the recipe says so, on cached latents."""

    def __init__(self, recipe: DiffusionRecipe, autoencoder: Path, latents: Latents) -> None:
        self.recipe, self.latents = recipe, latents
        self.length = len(latents)
        self.vae = load_model(AutoencoderKL, autoencoder).requires_grad_(False)
        self.scheduler = Scheduler.default(recipe.objective.prediction, recipe.objective.zero_terminal_snr)
        torch.manual_seed(recipe.seed)  # initial weights
        self.text_encoder, self.tokenizer = self.build_text_encoder()
        self.unet = UNet(recipe.unet)
        if recipe.unet.in_channels != self.vae.config.latent_channels:
            raise ValueError(
                f"unet.in_channels={recipe.unet.in_channels}, but the autoencoder has "
                f"{self.vae.config.latent_channels} latent channels"
            )
        if recipe.unet.cross_attention_dim != self.text_encoder.config.hidden_size:
            raise ValueError(
                f"unet.cross_attention_dim={recipe.unet.cross_attention_dim}, but the text encoder has "
                f"{self.text_encoder.config.hidden_size} channels"
            )
        self.module: nn.Module = Diffusion(self.unet, self.text_encoder, self.scheduler, recipe)
        self.facts: Mapping[str, Any] = {
            "data": latents.key.data,
            "autoencoder": latents.key.autoencoder,
            "unet": to_mapping(recipe.unet),
            "text_encoder": to_mapping(recipe.text_encoder),
            "objective": to_mapping(recipe.objective),
        }

    def build_text_encoder(self) -> tuple[CLIPTextEncoder, Tokenizer]:
        """The text encoder and its tokenizer, read or new; a new tokenizer learns the captions."""
        config = self.recipe.text_encoder
        if config.path is not None:
            folder = Path(config.path)
            encoder = load_model(CLIPTextEncoder, folder / "text_encoder")
            return encoder, Tokenizer.from_folder(folder / "tokenizer")
        captions = (caption for captions in self.latents.captions for caption in captions)
        tokenizer = Tokenizer.train(captions, config.vocab_size, config.max_length)
        encoder_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_length,
            projection_dim=config.width,
            pad_token_id=tokenizer.pad_id,
            bos_token_id=tokenizer.start_id,
            eos_token_id=tokenizer.end_id,
        )
        return CLIPTextEncoder(encoder_config), tokenizer

    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        """x0, noise (B, C, h, w), t (B,), tokens (B, N): each a function of the draw alone."""
        index = [draw.index for draw in draws]
        mean, std = self.latents.mean[index].float(), self.latents.std[index].float()
        shape = tuple(mean.shape[1:])
        u = float(torch.rand((), dtype=torch.float64, generator=generator("t", draws[0].seed, draws[0].step)))
        t = stratified_timesteps(draws[0].count, len(self.scheduler.schedule.alpha), u)
        return {
            "x0": self.vae.to_latents(mean + std * normal(draws, shape, "posterior")),
            "noise": normal(draws, shape, "noise"),
            "t": t[[draw.position for draw in draws]],
            "tokens": self.tokenizer(self.choose_captions(draws)),
        }

    def choose_captions(self, draws: list[Draw]) -> list[str]:
        """One of the captions of each sample, or the empty prompt."""
        choice, drop = uniform(draws, "caption").tolist(), uniform(draws, "drop").tolist()
        captions = [self.latents.captions[draw.index] for draw in draws]
        return [
            "" if lost < self.recipe.objective.caption_dropout else texts[int(which * len(texts))]
            for texts, which, lost in zip(captions, choice, drop, strict=True)
        ]

    def pipeline(self) -> LatentDiffusionPipeline:
        """The pipeline around the weights as they are now."""
        device = next(self.unet.parameters()).device
        self.vae.to(device)
        self.text_encoder.to(device)
        pipe = LatentDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            defaults=self.recipe.sampling,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def preview(self) -> Image.Image:
        """One picture a prompt, always from the same noise."""
        prompts = list(self.recipe.prompts) or [self.latents.captions[i][0] for i in spread(self.length, 8)]
        size = self.recipe.data.size
        images = self.pipeline()(prompts, height=size, width=size, seed=0, return_dict=False)[0]
        return grid(images, columns=min(len(images), 8))

    def export(self, folder: Path) -> None:
        """The whole pipeline, in the layout that stock diffusers reads."""
        self.pipeline().save_pretrained(folder)
        if self.recipe.export_dtype != "float32":
            # read again, so that the weights in training stay as they are
            dtype = getattr(torch, self.recipe.export_dtype)
            LatentDiffusionPipeline.from_pretrained(folder, dtype=dtype).save_pretrained(folder)


class Diffusion(nn.Module):
    """UNet, text encoder and loss in one forward, so that wrappers which watch forward see all of it.

    A frozen text encoder is called but is no part of this module, so it is not trained, averaged or saved.
    """

    def __init__(
        self, unet: UNet, text_encoder: CLIPTextEncoder, scheduler: Scheduler, recipe: DiffusionRecipe
    ) -> None:
        super().__init__()
        self.unet = unet
        self.schedule, self.kind = scheduler.schedule, scheduler.prediction
        self.weight = WEIGHTS[recipe.objective.weight]
        self.encode: Callable[[Tensor], Tensor]
        if recipe.text_encoder.train:
            self.text_encoder = text_encoder
            self.encode = text_encoder.__call__
        else:
            self.encode = frozen(text_encoder)

    def forward(
        self, x0: Tensor, noise: Tensor, t: Tensor, tokens: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,). x0, noise: (B, C, h, w); t: (B,) int64; tokens: (B, N) int64."""
        context = self.encode(tokens)
        loss = diffusion_loss(self.unet, self.schedule, x0, context, self.kind, noise, t, self.weight)
        return loss, {}


def frozen(text_encoder: CLIPTextEncoder) -> Callable[[Tensor], Tensor]:
    """tokens (B, N) -> context (B, N, D) by an encoder that does not learn, on the device of the tokens."""
    text_encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(tokens: Tensor) -> Tensor:
        return text_encoder.to(tokens.device)(tokens)

    return encode
