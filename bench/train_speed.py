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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator

from autoencoder.vae import AutoencoderKL
from bench.measure import hardware, seconds, table
from bench.models import SD1, narrower, write_pipeline
from bench.training import Peer, Step, agreement, faster_layout, our_recipe, our_step, read_pictures
from ldm.files.checkpoint import load_model
from train.tasks.diffusion import LatentDiffusion

CPU = torch.device("cpu")
WARM_UP = 2  # steps of each side that are not counted
SIDES = {
    "ours, latents cached": (
        "train.fit.loop's own step: posterior, noise, timestep and caption of each sample, drawn by counters "
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


def build(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps to be timed, and what each side does."""
    size = narrower(SD1, tuple(int(width) for width in options.channels.split(",")))
    write_pipeline(size, folder)
    vae = load_model(AutoencoderKL, folder / "vae").eval().requires_grad_(False)
    pictures = read_pictures(folder, options.pixels, CPU)
    recipe = our_recipe(folder, size, options.batch, precision="fp32")
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    task = LatentDiffusion(recipe, folder / "vae", pictures.latents())
    peer = Peer(folder, pictures, options.batch, accelerator)
    context = task.text_encoder(peer.tokens[:2])
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
                times[name] += [seconds(step, CPU) for _ in range(options.steps)]
    median = {name: statistics.median(values) for name, values in times.items()}
    median["ours, encoding each batch"] = median["ours, latents cached"] + median["encoding"]
    print(
        f"batch {options.batch}, {options.pixels}x{options.pixels} pixels, UNet {options.channels}; "
        f"{hardware(CPU)}; medians of {options.steps * options.rounds} steps\n"
    )
    lines = []
    for ours, theirs in PAIRS:
        for name in (ours, theirs):
            ratio = f"{median[theirs] / median[ours]:.2f}" if name == ours else ""
            lines.append([name, f"{options.batch / median[name]:.1f}", f"{median[name]:.3f}", ratio])
    print(table(["", "images/s", "seconds a step", "ours / diffusers"], lines))
    print()
    for name in SIDES:
        print(f"- {name}: {words[name]}")


if __name__ == "__main__":
    main()
