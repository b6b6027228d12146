"""Images a second in training: this trainer, and diffusers' classes in the loop of its example script.

  python bench/train_speed.py                      small models, under 4 minutes on two cores
  python bench/train_speed.py --steps 2 --rounds 1 --threads 1

Both train one UNet, from the same weights and with the same batch size, for epsilon's mean squared error,
with a frozen text encoder, gradients clipped at 1, fused AdamW and an average of the weights, in float32,
without compilation. They take turns, and medians over all steps are shown with what each does in a step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from ldm.checkpoint import save_model
from ldm.unet import UNetConfig
from train.captions import every
from train.data import DataConfig, open_source
from train.denoising import ObjectiveConfig
from train.diffusion import DiffusionRecipe, LatentDiffusion
from train.latents import Bucket, CacheKey, Latents
from train.loop import prepare, train_step
from train.optim import OptimConfig
from train.pictures import to_tensor
from train.plan import Plan
from train.planning import Unrecorded
from train.readahead import ReadAhead
from train.text import TextConfig, build_text_encoder

Step = Callable[[], Any]
RATE, DECAY = 1e-4, 0.9999
PICTURES = 64  # of drawn shapes, in memory
WARM_UP = 2  # steps of each side that are not counted
SIDES = {
    "ours, latents cached": (
        "train.loop's own step: posterior, noise, timestep and caption of each sample, drawn by counters "
        "from a cache in memory, text encoder, UNet, loss, clip, AdamW, EMA and its record; channels_last"
    ),
    "ours, encoding each batch": (
        "the step above, and the time in which our autoencoder encodes as many pictures; they are added, as "
        "this trainer always has a cache"
    ),
    "diffusers, latents cached": (
        "moments in memory, sampled; DDPMScheduler.add_noise, CLIPTextModel, UNet2DConditionModel, loss, "
        "accelerator.backward and clip_grad_norm_, torch's fused AdamW, EMAModel(foreach); {layout}"
    ),
    "diffusers, encoding each batch": (
        "the same, with AutoencoderKL.encode of the pictures, as the script does"
    ),
}
# Ours first; each pair is compared.
PAIRS = [tuple(SIDES)[::2], tuple(SIDES)[1::2]]


def models(options: argparse.Namespace) -> tuple[UNetConfig, AutoencoderKLConfig, TextConfig]:
    """A small UNet on 8x8 pixels a latent, with its autoencoder and text encoder."""
    widths = tuple(int(width) for width in options.channels.split(","))
    levels = len(widths)
    unet = UNetConfig(
        sample_size=options.pixels // 8,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=128,
        attention_head_dim=4,
    )
    vae = AutoencoderKLConfig(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=options.pixels,
    )
    return unet, vae, TextConfig(width=128, layers=4, heads=4, vocab_size=1024)


class Pictures:
    """Pictures of drawn shapes, their captions and their latents, for both sides."""

    def __init__(self, vae: AutoencoderKL, pixels: int) -> None:
        source = open_source(DataConfig(size=pixels, length=PICTURES))
        pairs = [source[index] for index in range(PICTURES)]
        self.image = torch.stack([to_tensor(image) for image, _ in pairs])
        self.captions = {index: every(captions) for index, (_, captions) in enumerate(pairs)}
        with torch.no_grad():
            posterior = vae.encode(self.image)
        self.mean, self.std = posterior.mean, posterior.std

    def latents(self) -> Latents:
        """As a cache holds them."""
        bucket = Bucket(list(range(PICTURES)), self.mean[:, None].half(), self.std[:, None].half())
        side = self.image.shape[-1]
        key = CacheKey("", "shapes", self.mean.shape[1], 8, [[side, side, PICTURES]], 1, False)
        return Latents([bucket], self.captions, key)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Rows of random batches without end, (size,) each, no row twice in one."""
        while True:
            yield torch.randperm(PICTURES)[:size]


def our_step(recipe: DiffusionRecipe, task: LatentDiffusion, accelerator: Accelerator) -> Step:
    """One step of `fit`, writing nothing."""
    plan = Plan(task.buckets, recipe.batch_size, recipe.seed)
    state, wrapped = prepare(task, recipe, accelerator)
    batches = ReadAhead(task, plan, 0, 0, 0).__enter__()
    record: Any = Unrecorded()
    return lambda: train_step(state, wrapped, batches, plan, recipe, accelerator, record)


class Peer:
    """diffusers' and transformers' classes in the steps of examples/text_to_image/train_text_to_image.py."""

    def __init__(
        self, folder: Path, pictures: Pictures, tokens: Tensor, batch: int, accelerator: Accelerator
    ) -> None:
        from diffusers import AutoencoderKL as StockVAE
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel
        from transformers import CLIPTextModel

        self.pictures, self.tokens, self.accelerator = pictures, tokens, accelerator
        self.rows = pictures.batches(batch)
        self.vae = StockVAE.from_pretrained(folder / "vae").requires_grad_(False)
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").train()
        self.noising = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        self.average = EMAModel(self.unet.parameters(), decay=DECAY, foreach=True)
        optimizer = torch.optim.AdamW(self.unet.parameters(), lr=RATE, weight_decay=1e-2, fused=True)
        rates = get_scheduler("constant", optimizer=optimizer)
        self.unet, self.optimizer, self.rates = accelerator.prepare(self.unet, optimizer, rates)

    def lay_out(self, memory_format: torch.memory_format) -> None:
        for model in (self.unet, self.vae):
            model.to(memory_format=memory_format)

    def encoded(self, rows: Tensor) -> Tensor:
        """Scaled latents of pictures, encoded now."""
        with torch.no_grad():
            moments = self.vae.encode(self.pictures.image[rows]).latent_dist
        return moments.sample() * self.vae.config.scaling_factor

    def cached(self, rows: Tensor) -> Tensor:
        """Scaled latents of pictures that were encoded before."""
        mean, std = self.pictures.mean[rows], self.pictures.std[rows]
        return (mean + std * torch.randn_like(mean)) * self.vae.config.scaling_factor

    def step(self, latents_of: Callable[[Tensor], Tensor]) -> None:
        rows = next(self.rows)
        with self.accelerator.accumulate(self.unet):
            latents = latents_of(rows)
            noise = torch.randn_like(latents)
            t = torch.randint(0, self.noising.config.num_train_timesteps, (len(rows),))
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


def seconds(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def faster_layout(peer: Peer) -> str:
    """Leaves the peer in the memory layout in which it is faster, by three steps each after one."""
    layouts = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    spent = {}
    for name, layout in layouts.items():
        peer.lay_out(layout)
        spent[name] = statistics.median([seconds(lambda: peer.step(peer.encoded)) for _ in range(4)][1:])
    best = min(spent, key=spent.__getitem__)
    peer.lay_out(layouts[best])
    words = ", ".join(f"{name} {value:.3f} s" for name, value in spent.items())
    return f"{best}, the faster of {words} a step"


def agreement(ours: torch.nn.Module, theirs: torch.nn.Module, context: Tensor, side: int) -> float:
    """The largest difference of what two UNets answer."""
    xt, t = torch.randn(2, 4, side, side), torch.tensor([7, 901])
    with torch.no_grad():
        return (ours(xt, t, context) - theirs(xt, t, context).sample).abs().max().item()


def build(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps to be timed, and what each side does."""
    unet, vae_config, text = models(options)
    vae = AutoencoderKL(vae_config).eval().requires_grad_(False)
    pictures = Pictures(vae, options.pixels)
    encoder, tokenizer = build_text_encoder(text, list(pictures.captions.values()))
    save_model(vae, folder / "vae")
    save_model(encoder, folder / "text_encoder")
    tokenizer.save(folder / "tokenizer")
    recipe = DiffusionRecipe(
        output=str(folder / "run"),
        autoencoder=str(folder / "vae"),
        steps=10**6,
        batch_size=options.batch,
        precision="fp32",
        ema_decay=DECAY,
        optim=OptimConfig(lr=RATE, warmup_steps=0, curve="constant", betas=(0.9, 0.999)),
        text_encoder=TextConfig(path=str(folder), train=False),
        unet=unet,
        objective=ObjectiveConfig(
            prediction="eps", zero_terminal_snr=False, weight="none", caption_dropout=0.0
        ),
    )
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    task = LatentDiffusion(recipe, folder / "vae", pictures.latents())
    save_model(task.unet, folder / "unet")
    tokens = tokenizer([captions[0] for captions in pictures.captions.values()])
    peer = Peer(folder, pictures, tokens, options.batch, accelerator)
    context = task.text_encoder(tokens[:2])
    print(
        f"{sum(p.numel() for p in task.unet.parameters()) / 1e6:.1f} M parameters; both UNets answer alike "
        f"to {agreement(task.unet, peer.unet, context, options.pixels // 8):.1e}"
    )
    ours = our_step(recipe, task, accelerator)
    vae.to(memory_format=torch.channels_last)
    rows = pictures.batches(options.batch)

    @torch.no_grad()
    def encode() -> None:
        posterior = vae.encode(pictures.image[next(rows)])
        posterior.sample(torch.randn_like(posterior.mean))

    layout = faster_layout(peer)
    steps: dict[str, Step] = {
        "ours, latents cached": ours,
        "encoding": encode,
        "diffusers, latents cached": lambda: peer.step(peer.cached),
        "diffusers, encoding each batch": lambda: peer.step(peer.encoded),
    }
    return steps, {name: text.format(layout=layout) for name, text in SIDES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8, help="of each side in a round")
    parser.add_argument("--rounds", type=int, default=3, help="in each, every side has its turn")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step")
    parser.add_argument("--pixels", type=int, default=128, help="side of a picture, a multiple of 32")
    parser.add_argument("--channels", default="64,128,256", help="of the UNet's levels")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        steps, words = build(Path(folder), options)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(WARM_UP):
            for step in steps.values():
                step()
        for _ in range(options.rounds):
            for name, step in steps.items():
                times[name] += [seconds(step) for _ in range(options.steps)]
    median = {name: statistics.median(values) for name, values in times.items()}
    median["ours, encoding each batch"] = median["ours, latents cached"] + median["encoding"]
    print(
        f"batch {options.batch}, {options.pixels}x{options.pixels} pixels, UNet {options.channels}, "
        f"{options.threads} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}; "
        f"medians of {options.steps * options.rounds} steps\n"
    )
    print("| | images/s | seconds a step | ours / diffusers |\n|---|---|---|---|")
    for ours, theirs in PAIRS:
        for name in (ours, theirs):
            ratio = f"{median[theirs] / median[ours]:.2f}" if name == ours else ""
            print(f"| {name} | {options.batch / median[name]:.1f} | {median[name]:.3f} | {ratio} |")
    print()
    for name in SIDES:
        print(f"- {name}: {words[name]}")


if __name__ == "__main__":
    main()
