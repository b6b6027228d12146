"""What a run will take: parameters, memory, arithmetic and time, from a probe that leaves no trace.

`--plan` on any training script. Every stage of the recipe is probed with new weights, and with made-up
latents, all of them squares, where it needs some: nothing is computed first.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import load_model, save_model
from train.batches.cache import made_up
from train.batches.latents import autoencoder_folder
from train.batches.plan import Plan
from train.batches.readahead import ReadAhead
from train.fit.loop import choose_precision, cpu_only, prepare, train_step, workers
from train.fit.optim import optimizer_tensors
from train.fit.shards import wants_shards
from train.fit.state import FitConfig, State, Task
from train.tasks.autoencoding import AutoencoderRecipe, Autoencoding, lineage, stage_name
from train.tasks.contrastive import Contrastive, ContrastiveRecipe
from train.tasks.diffusion import DiffusionRecipe, LatentDiffusion

STEPS = 20  # of a probe
WARM_UP = 3  # of them, not counted: the first also counts operations and bytes


class Stage(NamedTuple):
    """One training of a recipe."""

    name: str
    task: Task
    config: FitConfig


class Probe(NamedTuple):
    """What a stage takes."""

    name: str
    trained: int  # parameters
    gigaflop: float  # a step, forward and backward, over all ranks
    speed: float  # samples a second, over all ranks, reading the data included
    memory: Mapping[str, int]  # bytes a rank, by what they are for
    hours: float  # of training from the first step to the last

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in self.memory.items())
        return (
            f"{self.name}: {self.trained / 1e6:,.2f} M parameters trained, {self.gigaflop:,.1f} GFLOP "
            f"a step, {self.speed:,.1f} samples/s, {duration(self.hours)}\n"
            f"  {sum(self.memory.values()) / 2**20:,.0f} MiB a rank: {parts}"
        )


class Unrecorded:
    """Stands for the record of a run that leaves none."""

    last_good = None

    def add(self, step: int, values: Mapping[str, Tensor], rate: float, skipped: int) -> None:
        pass

    def bad_batches(self, batches: Mapping[int, list[int]]) -> str:
        return ""


def show_plan(stages: Iterable[Stage], price: float) -> None:
    """Prints what each stage takes, and all of them. price: of an hour of one rank, in any currency."""
    hours = cost = 0.0
    for stage in stages:
        accelerator = Accelerator(cpu=cpu_only(), mixed_precision=choose_precision(stage.config.precision))
        if wants_shards(accelerator.distributed_type):
            raise ValueError("plan counts whole weights on every rank: leave out accelerate's --use_fsdp")
        one = probe(stage, accelerator)
        hours += one.hours
        cost += price * one.hours * accelerator.num_processes
        if accelerator.is_main_process:
            print(one)
    words = f", {cost:,.2f} at {price:g} an hour and rank" if price else ""
    if accelerator.is_main_process:
        print(f"in all {duration(hours)} of training{words}; nothing was written")


def duration(hours: float) -> str:
    return f"{hours * 60:,.0f} minutes" if hours < 2 else f"{hours:,.1f} hours"


def probe(stage: Stage, accelerator: Accelerator) -> Probe:
    """STEPS steps of the stage as `fit` would make them, without a trace."""
    task, config = stage.task, dataclasses.replace(stage.config, steps=max(STEPS, stage.config.steps))
    plan = Plan(task.buckets, config.batch_size, config.seed, accelerator.num_processes, config.micro_batch)
    state, wrapped = prepare(task, config, accelerator)
    record: Any = Unrecorded()
    saved, times = SavedForBackward(state), []
    with ReadAhead(task, plan, accelerator.process_index, 0, workers(config)) as batches:
        with FlopCounterMode(display=False) as flops, saved:
            train_step(state, wrapped, batches, plan, config, accelerator, record)
        for _ in range(STEPS - 1):
            begin = time.perf_counter()
            train_step(state, wrapped, batches, plan, config, accelerator, record)
            times.append(time.perf_counter() - begin)
    seconds = statistics.median(times[WARM_UP - 1 :])
    gigaflop = flops.get_total_flops() / 1e9 * accelerator.num_processes
    trained = sum(p.numel() for p in state.module.parameters() if p.requires_grad)
    memory = bytes_of(state) | {"activations": saved.bytes}
    speed, hours = config.batch_size / seconds, stage.config.steps * seconds / 3600
    return Probe(stage.name, trained, gigaflop, speed, memory, hours)


class SavedForBackward(saved_tensors_hooks):
    """Counts the bytes that autograd keeps from the first forward to its backward, parameters aside."""

    def __init__(self, state: State) -> None:
        self.bytes, self.forward = 0, True
        self.seen = {value.untyped_storage().data_ptr() for value in weights(state.module)}
        super().__init__(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self.forward and storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        self.forward = False
        return tensor


def weights(module: nn.Module) -> Iterator[Tensor]:
    """Those of the module, and of the frozen model that it works on where there is one beside it."""
    yield from module.state_dict().values()
    for model in getattr(module, "outside", ()):
        yield from model.state_dict().values()


def bytes_of(state: State) -> dict[str, int]:
    """What the state of a run takes on each rank."""

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    averages = [tensor for ema in (state.ema, *state.powers.values()) for tensor in ema.average.values()]
    return {
        "weights": size(weights(state.module)),
        "gradients": size(p for p in state.module.parameters() if p.requires_grad),
        "optimizer": size(optimizer_tensors(state.optimizer, state.module).values()),
        "averages": size(averages),
    }


def stages_of(
    recipe: DiffusionRecipe,
    autoencoder: AutoencoderRecipe | None,
    text_encoder: ContrastiveRecipe | None,
    folder: Path,
) -> Iterator[Stage]:
    """What train_ldm.py trains. The recipes of earlier stages, where there are some; folder: temporary."""
    if autoencoder is None:
        trained = autoencoder_folder(recipe.autoencoder)
        model = load_model(AutoencoderKL, trained).config
    else:
        yield from autoencoder_plan(autoencoder, folder)
        trained, model = folder / "autoencoder", autoencoder.model
        save_model(AutoencoderKL(model), trained)
    latents = made_up(recipe.data, model)
    if text_encoder is not None:
        task = Contrastive(text_encoder, trained, latents)
        yield Stage("text encoder", task, text_encoder)
        task.export(folder / "text_encoder")
        words = dataclasses.replace(recipe.text_encoder, path=str(folder / "text_encoder"))
        recipe = dataclasses.replace(recipe, text_encoder=words)
    yield Stage("UNet", LatentDiffusion(recipe, trained, latents), recipe)


def autoencoder_plan(recipe: AutoencoderRecipe, folder: Path) -> Iterator[Stage]:
    """What training an autoencoder takes, and first those from which it grows. folder: temporary."""
    recipes = lineage(recipe)
    grow = recipes[0].grow
    for number, one in enumerate(recipes):
        one = dataclasses.replace(one, grow=grow)
        yield Stage(stage_name(number, len(recipes)), Autoencoding(one), one)
        grow = str(folder / f"autoencoder-{number}")
        save_model(AutoencoderKL(one.model), Path(grow))
