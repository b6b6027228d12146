"""The autoencoder as a task of `fit`: pictures in, pictures out, and a latent scale measured at the end."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from autoencoder.discriminator import AdversaryConfig
from autoencoder.equivariance import shrink, shrunk_sides, turn
from autoencoder.growth import MEASURED, check_growth, grown
from autoencoder.loss import ReconstructionConfig
from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig, Posterior
from ldm.diffusion.noise import key
from ldm.files.checkpoint import empty_model, load_model, save_model
from train.batches.buckets import View, views
from train.batches.latents import autoencoder_folder
from train.batches.plan import Draw, choose, fixed_draws, normal, spread, uniform
from train.config import is_recipe, read_recipe, to_mapping
from train.data.sources import DataConfig
from train.data.squares import Squares
from train.fit.checkpoint import weights_sha256
from train.fit.state import FitConfig
from train.measure.features import digest, perceptual_distance
from train.measure.fidelity import Fidelity, before_and_after, encoded, judge, reconstruct
from train.tasks.reconstruction import Growth, Reconstruction

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe(FitConfig):
    """Training of an autoencoder."""

    data: DataConfig = field(default_factory=DataConfig)
    model: AutoencoderKLConfig
    gradient_checkpointing: bool = False  # much less memory for a third more time
    loss: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    start: str | None = None  # folder of a trained one to go on from; null: new weights
    grow: str | None = None  # trained one (folder or .yaml), narrower or a level less: keep its latents
    train_encoder: bool = True  # false: only the decoder learns, and latents computed before stay valid
    latent_noise: float = 0.0  # of a decoder that learns alone: deviation, at most, of noise on its latents
    measured: int = 2048  # pictures over which the scale of the latents and the error are measured at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data.check_squares("an autoencoder")
        factor = 2 ** (len(self.model.block_out_channels) - 1)
        if self.data.size % factor:
            raise ValueError(
                f"data.size={self.data.size} is not a multiple of {factor}, the model's downsampling"
            )
        if self.loss.half_size and self.data.size % (2 * factor):
            raise ValueError(
                f"data.size={self.data.size} with loss.half_size: expected a multiple of {2 * factor}, "
                "so that half of it fits too"
            )
        self.loss.check_size(self.data.size)
        if self.adversary.weight and self.data.size < self.adversary.smallest:
            raise ValueError(
                f"data.size={self.data.size}: a discriminator with adversary.layers={self.adversary.layers} "
                f"needs {self.adversary.smallest} pixels a side; take fewer layers"
            )
        if not self.train_encoder and self.start is None and self.grow is None:
            raise ValueError(
                "train_encoder=false needs start or grow: the encoder of new weights knows nothing"
            )
        if self.latent_noise < 0 or (self.latent_noise and self.train_encoder and self.grow is None):
            raise ValueError(
                f"latent_noise={self.latent_noise}: expected 0, or more with train_encoder=false or grow, "
                "where the decoder does not teach the encoder"
            )
        if self.grow is not None:
            self.check_growth()
        if self.measured < 1:
            raise ValueError(f"measured={self.measured}: expected 1 or more pictures")

    def check_growth(self) -> None:
        """Raises ValueError for what does not go with grow."""
        if self.start is not None:
            raise ValueError(f"grow starts from the small autoencoder: leave out start={self.start!r}")
        if self.loss.half_size or self.loss.equivariance:
            raise ValueError(
                "grow keeps the latents of the small autoencoder: loss.half_size and loss.equivariance, "
                "which shape latents, have no effect, set them to 0"
            )

    @property
    def terms(self) -> ReconstructionConfig:
        """The loss with its equivariance decided: new weights get it unless half_size takes its place."""
        if self.loss.equivariance is not None:
            return self.loss
        weight = 0.0 if self.start or self.grow or self.loss.half_size else 0.5
        return dataclasses.replace(self.loss, equivariance=weight)


def lineage(recipe: AutoencoderRecipe, grown: tuple[str, ...] = ()) -> list[AutoencoderRecipe]:
    """The recipe and, before it, those that it grows from, the first of them first; grown: seen before.

    They train on the same pictures, at half their size where there is a level less. Raises ValueError, before
    anything trains, if one cannot grow from that before it.
    """
    if not is_recipe(recipe.grow):
        return [recipe]
    path = str(Path(str(recipe.grow)).resolve())
    if path in grown:
        raise ValueError(f"grow={recipe.grow!r} grows from itself: one of these recipes must start anew")
    small = read_recipe(AutoencoderRecipe, str(recipe.grow))
    check_growth(small.model, recipe.model, keep_encoder=not recipe.train_encoder)
    levels = len(recipe.model.block_out_channels) - len(small.model.block_out_channels)
    before = dataclasses.replace(
        small,
        data=dataclasses.replace(recipe.data, size=recipe.data.size // 2**levels),
        output=str(Path(recipe.output, "small")),
        precision=recipe.precision,
        max_minutes=recipe.max_minutes,
        accept_new_data=recipe.accept_new_data,
    )
    return [*lineage(before, (*grown, path)), recipe]


def stage_name(number: int, count: int) -> str:
    """What the autoencoder is called that is `number`, from 0, of the `count` of a lineage."""
    return "autoencoder" if count == 1 else f"autoencoder {number + 1} of {count}"


class Autoencoding:
    """Trains an AutoencoderKL to give back the pictures of a source."""

    def __init__(self, recipe: AutoencoderRecipe) -> None:
        self.recipe = recipe
        self.squares = Squares(recipe.data)
        self.length = len(self.squares)
        self.buckets = [range(self.length)]
        torch.manual_seed(recipe.seed)  # initial weights
        self.small = (
            None
            if recipe.grow is None
            else load_model(AutoencoderKL, autoencoder_folder(recipe.grow, "grow"))
        )
        self.vae = self.build()
        self.vae.encoder.requires_grad_(recipe.train_encoder)
        self.vae.quant_conv.requires_grad_(recipe.train_encoder)
        if recipe.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.terms = recipe.terms
        self.distance = None
        if self.terms.vgg:
            self.distance = perceptual_distance(self.terms.vgg, self.terms.lpips_heads)
        else:
            log.info("%s", without_features(self.terms))
        self.reconstruction = self.with_loss()
        self.module: nn.Module = self.reconstruction
        factor, size = self.vae.downsample_factor, recipe.data.size
        self.latent_shape = (recipe.model.latent_channels, size // factor, size // factor)
        self.facts: Mapping[str, Any] = {
            "data": self.squares.source.description,
            "views": [recipe.data.crops, recipe.data.flip],
            "model": to_mapping(recipe.model),
            "loss": {
                **to_mapping(self.terms),
                "vgg": digest(self.terms.vgg),
                "lpips_heads": digest(self.terms.lpips_heads),
            },
            "adversary": to_mapping(recipe.adversary),
            "train_encoder": recipe.train_encoder,
            "latent_noise": recipe.latent_noise,
        }
        if self.small is not None:
            self.facts = {**self.facts, "grow": weights_sha256(self.small.state_dict())}

    def build(self) -> AutoencoderKL:
        """New weights, or those of recipe.start or recipe.grow. Raises ValueError if these do not fit."""
        if self.small is not None:
            check_growth(self.small.config, self.recipe.model, keep_encoder=not self.recipe.train_encoder)
            return grown(self.small, self.recipe.model)
        if self.recipe.start is None:
            return AutoencoderKL(self.recipe.model)
        folder = autoencoder_folder(self.recipe.start, "start")
        vae = load_model(AutoencoderKL, folder)
        own = {name: getattr(vae.config, name) for name in MEASURED}
        if dataclasses.replace(self.recipe.model, **own) != vae.config:
            raise ValueError(f"start: the autoencoder in {folder} is not of the recipe's model: {vae.config}")
        return vae

    def with_loss(self) -> Reconstruction:
        """The autoencoder with its loss."""
        recipe = self.recipe
        if self.small is not None and recipe.train_encoder:
            return Growth(self.vae, self.small, self.terms, recipe.adversary, self.distance)
        return Reconstruction(self.vae, self.terms, recipe.adversary, self.distance)

    def contents(self) -> Mapping[str, str]:
        return self.squares.source.contents()

    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        """What Reconstruction takes in this step: each a function of the draws alone."""
        data, adversary = self.recipe.data, self.recipe.adversary
        every = [views(draw.index, data.crops, data.flip) for draw in draws]
        chosen = choose(draws, len(every[0]), "view")
        image = torch.stack([self.image(d.index, e[k]) for d, e, k in zip(draws, every, chosen, strict=True)])
        batch = self.seen(draws, image)
        if self.recipe.latent_noise:
            level = self.recipe.latent_noise * uniform(draws, "latent noise level").float()
            batch["added"] = level.view(-1, 1, 1, 1) * normal(draws, self.latent_shape, "latent noise")
        if adversary.weight and draws[0].step >= adversary.start * self.recipe.steps:
            batch["adversarial"] = torch.full((len(draws),), adversary.weight)
        return batch

    def seen(self, draws: list[Draw], image: Tensor) -> dict[str, Tensor]:
        """The pictures, the posterior's noise and, where the loss asks for them, the pictures transformed.

        A step has one size, so that its batch has one shape on all ranks, and each picture its own turn.
        """
        batch = {"image": image, "noise": normal(draws, self.latent_shape, "posterior")}
        factor, side = self.vae.downsample_factor, self.latent_shape[1]
        if self.terms.half_size:
            batch["transformed"] = shrink(image, (factor * side // 2,) * 2)
        elif self.terms.equivariance:
            sides = shrunk_sides(side)
            chosen = sides[key("transformed side", draws[0].seed, draws[0].step) % len(sides)]
            batch["turns"] = (4 * uniform(draws, "turns")).long()
            batch["transformed"] = turn(shrink(image, (factor * chosen,) * 2), batch["turns"])
        return batch

    def image(self, index: int, view: View = View()) -> Tensor:  # noqa: B008 (a constant)
        return self.squares.image(index, view)

    def validate(self, buckets: Sequence[Sequence[int]]) -> dict[str, float]:
        """The parts of the loss, and what the fidelity of reconstructions and latents is."""
        totals: dict[str, float] = {}
        count = sum(map(len, buckets))

        def weighed() -> Iterator[tuple[Tensor, Posterior]]:
            """The pictures, encoded, once their losses are in the totals."""
            for draws in fixed_draws(buckets):
                image = self.squares.stack([draw.index for draw in draws])
                batch = {name: value.to(self.device) for name, value in self.seen(draws, image).items()}
                posterior = self.vae.encode(batch["image"])
                loss, parts = self.reconstruction.losses(posterior, **batch)
                for name, value in {"loss": loss, **parts}.items():
                    totals[name] = totals.get(name, 0.0) + value.sum().item() / count
                yield batch["image"], posterior

        fidelity = judge(self.vae, weighed(), self.distance)
        for name in ("generator", "discriminator", "adaptive_weight"):
            totals.pop(name, None)  # nobody is judged here
        return {**totals, **fidelity.numbers()}

    def preview(self) -> Image.Image:
        """Eight pictures and, below each, what the autoencoder makes of it."""
        return before_and_after(self.vae, self.squares.stack(spread(self.length, 8)))

    def reconstruct(self, image: Tensor) -> Tensor:
        return reconstruct(self.vae, image)

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def export(self, folder: Path) -> None:
        """The autoencoder with its measured scaling_factor, as a folder that stock diffusers reads."""
        measured = self.measure()
        scale = measured.scaling_factor
        config = dataclasses.replace(
            self.recipe.model,
            scaling_factor=scale,
            shift_factor=None,  # stock StableDiffusionPipeline does not know it
            latent_rgb_factors=tuple(tuple(f / scale for f in row) for row in measured.rgb_factors),
            latent_rgb_bias=measured.rgb_bias,
        )
        if self.small is not None or not self.recipe.train_encoder:
            config = self.vae.config  # the latents are those of before, and so is their scale
        vae = empty_model(AutoencoderKL, config)
        vae.load_state_dict(self.vae.state_dict(), assign=True)
        save_model(vae, folder)
        log.info("autoencoder: PSNR %.2f dB, scaling_factor %.4f", measured.psnr, scale)
        rows = zip(measured.mean, measured.std, measured.noise, strict=True)
        for channel, (mean, std, noise) in enumerate(rows):
            log.info("  channel %d: mean %.3g, std %.3g, noise %.1f%%", channel, mean, std, 100 * noise)
        empty = [channel for channel, share in enumerate(measured.noise) if share > 0.5]
        if empty:
            log.warning(
                "latent channels %s of %d hold next to nothing: a UNet spends its training on their noise. "
                "Lower model.latent_channels by as many, or loss.kl",
                empty,
                len(measured.noise),
            )

    def measure(self) -> Fidelity:
        """Over `measured` pictures."""
        batches = self.squares.batches(spread(self.length, self.recipe.measured))
        return judge(self.vae, encoded(self.vae, batches), self.distance)


def without_features(terms: ReconstructionConfig) -> str:
    """What the log says where no perceptual features judge the reconstruction."""
    names = ("l1", "mse", "gradient", "ms_ssim")
    weights = ", ".join(f"{name} {getattr(terms, name):g}" for name in names if getattr(terms, name))
    return f"no loss.vgg: reconstructions are judged by {weights}, not by perceptual features"
