"""The two sides of a bench of training, with the same weights: our trainer's step and diffusers' script.

Both train the UNet of a pipeline folder for epsilon's mean squared error, with a frozen text encoder,
gradients clipped at 1, fused AdamW and an average of the weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from autoencoder.vae import AutoencoderKL
from bench import measure
from bench.models import Size
from ldm.files.checkpoint import load_model
from text_encoder.tokenizer import Tokenizer
from train.batches.latents import Bucket, CacheKey, Latents
from train.batches.plan import Plan
from train.batches.readahead import ReadAhead
from train.data.captions import every
from train.data.pictures import to_tensor
from train.data.sources import DataConfig, open_source
from train.fit.loop import prepare, train_step, workers
from train.fit.optim import OptimConfig
from train.fit.planning import Unrecorded
from train.tasks.denoising import ObjectiveConfig
from train.tasks.diffusion import DiffusionRecipe, LatentDiffusion
from train.tasks.text import TextConfig

Step = Callable[[], Any]
Precision = Literal["fp32", "bf16"]
RATE, DECAY = 1e-4, 0.9999
PICTURES = 64  # of drawn shapes, in memory; a batch is no larger
ENCODED = 8  # pictures at a time


class Pictures:
    """Pictures of drawn shapes, their captions and their latents, for both sides; on the device."""

    def __init__(self, vae: AutoencoderKL, pixels: int, device: torch.device) -> None:
        source = open_source(DataConfig(size=pixels, length=PICTURES))
        pairs = [source[index] for index in range(PICTURES)]
        self.image = torch.stack([to_tensor(image) for image, _ in pairs]).to(device)
        self.captions = {index: every(captions) for index, (_, captions) in enumerate(pairs)}
        with torch.no_grad():
            posteriors = [vae.to(device).encode(some) for some in self.image.split(ENCODED)]
        self.mean = torch.cat([posterior.mean for posterior in posteriors])
        self.std = torch.cat([posterior.std for posterior in posteriors])

    def latents(self) -> Latents:
        """As a cache holds them."""
        mean, std = (moment[:, None].half().cpu() for moment in (self.mean, self.std))
        side = self.image.shape[-1]
        key = CacheKey(
            "", "shapes", mean.shape[2], side // mean.shape[-1], [[side, side, PICTURES]], 1, False
        )
        return Latents([Bucket(list(range(PICTURES)), mean, std)], self.captions, key)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Rows of random batches without end, (size,) each, no row twice in one."""
        while True:
            yield torch.randperm(PICTURES, device=self.image.device)[:size]


def read_pictures(folder: Path, pixels: int, device: torch.device) -> Pictures:
    """Encoded by the autoencoder of the pipeline folder."""
    return Pictures(load_model(AutoencoderKL, folder / "vae").eval(), pixels, device)


def our_recipe(
    folder: Path, size: Size, batch: int, *, precision: Precision, compiled: bool = False
) -> DiffusionRecipe:
    """Goes on from the weights of the pipeline folder."""
    return DiffusionRecipe(
        output=str(folder / "run"),
        autoencoder=str(folder / "vae"),
        start=str(folder),
        steps=10**6,
        batch_size=batch,
        precision=precision,
        compile=compiled,
        ema_decay=DECAY,
        optim=OptimConfig(lr=RATE, warmup_steps=0, curve="constant", betas=(0.9, 0.999)),
        text_encoder=TextConfig(path=str(folder), train=False),
        unet=size.unet,
        objective=ObjectiveConfig(
            prediction="eps", zero_terminal_snr=False, weight="none", caption_dropout=0.0
        ),
    )


def our_step(recipe: DiffusionRecipe, task: LatentDiffusion, accelerator: Accelerator) -> Step:
    """One step of `fit`, writing nothing."""
    plan = Plan(task.buckets, recipe.batch_size, recipe.seed, accelerator.num_processes)
    state, wrapped = prepare(task, recipe, accelerator)
    batches = ReadAhead(task, plan, accelerator.process_index, 0, workers(recipe)).__enter__()
    record: Any = Unrecorded()
    return lambda: train_step(state, wrapped, batches, plan, recipe, accelerator, record)


class Peer:
    """diffusers' and transformers' classes in the steps of examples/text_to_image/train_text_to_image.py."""

    def __init__(self, folder: Path, pictures: Pictures, batch: int, accelerator: Accelerator) -> None:
        from diffusers import AutoencoderKL as StockVAE
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel
        from transformers import CLIPTextModel

        self.pictures, self.accelerator, self.device = pictures, accelerator, accelerator.device
        self.dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        place = {"device": self.device, "dtype": self.dtype}  # of what is frozen, as in the script
        self.rows = pictures.batches(batch)
        captions = [captions[0] for captions in pictures.captions.values()]
        self.tokens = Tokenizer.from_folder(folder / "tokenizer")(captions).to(self.device)
        self.vae = StockVAE.from_pretrained(folder / "vae").requires_grad_(False).to(**place)
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
        self.text_encoder = encoder.to(**place)
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").to(self.device).train()
        self.noising = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        self.average = EMAModel(self.unet.parameters(), decay=DECAY, foreach=True)
        self.average.to(self.device)
        optimizer = torch.optim.AdamW(self.unet.parameters(), lr=RATE, weight_decay=1e-2, fused=True)
        rates = get_scheduler("constant", optimizer=optimizer)
        self.unet, self.optimizer, self.rates = accelerator.prepare(self.unet, optimizer, rates)

    def lay_out(self, memory_format: torch.memory_format) -> None:
        for model in (self.unet, self.vae):
            model.to(memory_format=memory_format)

    def encoded(self, rows: Tensor) -> Tensor:
        """Scaled latents of pictures, encoded now."""
        with torch.no_grad():
            moments = self.vae.encode(self.pictures.image[rows].to(self.dtype)).latent_dist
        return moments.sample() * self.vae.config.scaling_factor

    def cached(self, rows: Tensor) -> Tensor:
        """Scaled latents of pictures that were encoded before."""
        mean, std = self.pictures.mean[rows], self.pictures.std[rows]
        return ((mean + std * torch.randn_like(mean)) * self.vae.config.scaling_factor).to(self.dtype)

    def step(self, latents_of: Callable[[Tensor], Tensor]) -> None:
        rows = next(self.rows)
        with self.accelerator.accumulate(self.unet):
            latents = latents_of(rows)
            noise = torch.randn_like(latents)
            t = torch.randint(0, self.noising.config.num_train_timesteps, (len(rows),), device=self.device)
            noised = self.noising.add_noise(latents, noise, t)
            with torch.no_grad():
                context = self.text_encoder(self.tokens[rows], return_dict=False)[0]
            prediction = self.unet(noised, t, context, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), noise.float())
            self.accelerator.gather(loss.repeat(len(rows))).mean().item()  # its log
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.rates.step()
            self.optimizer.zero_grad()
        self.average.step(self.unet.parameters())


def faster_layout(peer: Peer) -> str:
    """Leaves the peer in the memory layout in which it is faster, by three steps each after one."""
    layouts = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    spent = {}
    for name, layout in layouts.items():
        peer.lay_out(layout)
        times = [measure.seconds(lambda: peer.step(peer.encoded), peer.device) for _ in range(4)]
        spent[name] = statistics.median(times[1:])
    best = min(spent, key=spent.__getitem__)
    peer.lay_out(layouts[best])
    words = ", ".join(f"{name} {value:.3f} s" for name, value in spent.items())
    return f"{best}, the faster of {words} a step"


def agreement(ours: torch.nn.Module, theirs: torch.nn.Module, context: Tensor, side: int) -> float:
    """The largest difference of what two UNets answer. side: of the latents."""
    xt, t = torch.randn(2, 4, side, side), torch.tensor([7, 901])
    with torch.no_grad():
        return (ours(xt, t, context) - theirs(xt, t, context).sample).abs().max().item()
