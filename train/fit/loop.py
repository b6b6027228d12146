"""`fit`: the only training loop. A task says what is trained on what; the loop makes it last and repeat.

What accelerate does here: device, precision, ranks, trackers. Sample order, random draws, learning rate and
checkpoints are ours, because accelerate's do not resume exactly.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from ldm.diffusion.noise import key
from ldm.drawing.devices import default_dtype
from train.batches.plan import Plan
from train.batches.readahead import ReadAhead
from train.config import to_mapping
from train.fit.ema import EMA, classic, power
from train.fit.failure import RunFailed
from train.fit.optim import build_optimizer, learning_rate, warmup_of
from train.fit.record import Record, open_run
from train.fit.resume import facts, machine, resume
from train.fit.saving import Saver, snapshot
from train.fit.shards import clip as clip_shards
from train.fit.shards import shard, sharding, warn_of_wrapping
from train.fit.state import FitConfig, Outcome, State, Task
from train.fit.stop import StopRequest
from train.fit.watchdog import Watchdog

log = logging.getLogger(__name__)
MAX_BAD_STEPS = 10  # non-finite gradients in a row before the run gives up
ONE_SAMPLE = "set gradient_checkpointing where the recipe has it, a smaller data.size or a smaller model"


def fit(task: Task, config: FitConfig) -> Outcome:
    """Train `task` for config.steps optimizer steps, from the newest checkpoint if there is one.

    Raises ValueError if the run cannot be resumed as asked, RunFailed when gradients stay non-finite or the
    last state cannot be saved.
    """
    accelerator = Accelerator(
        cpu=cpu_only(),
        mixed_precision=choose_precision(config.precision),
        log_with=config.tracker,
        project_dir=config.output,
    )
    tell_first(config, accelerator)
    plan = Plan(
        task.buckets,
        config.batch_size,
        config.seed,
        accelerator.num_processes,
        config.micro_batch,
        config.validation_samples,
    )
    with (
        open_run(Path(config.output), config, accelerator) as record,
        StopRequest(accelerator, config.max_minutes) as stop,
        Watchdog(record.folder, config.watchdog_minutes, accelerator.process_index) as dog,
        make_saver(task, config, record, accelerator) as saver,
    ):
        for bucket in plan.trained:
            if 0 < len(bucket) < plan.batch_size:
                record.say(
                    f"a bucket has {len(bucket)} samples, less than a batch: it holds some of them twice"
                )
        state, wrapped = prepare(task, config, accelerator)
        dog.listen(state.whole)
        resume(state, task, config, record, accelerator)
        plan = replace(plan, first=state.data_since)
        with ReadAhead(task, plan, accelerator.process_index, state.step, workers(config)) as batches:
            while state.step < config.steps and not stop.agreed():
                with memory_advice(plan, state, record):
                    train_step(state, wrapped, batches, plan, config, accelerator, record)
                dog.beat(state.step)
                saver.settle(wait=False)
                for do in pieces(task, state, plan, config, saver):
                    with dog.piece(state.step):
                        do()
        with dog.piece(state.step):
            saver.finish(state)
            finished, exported = state.step >= config.steps, record.exported_step() == state.step
            accelerator.wait_for_everyone()  # nobody exports before all have looked
        if finished and not exported:
            with dog.piece(state.step):
                export(task, state, record, accelerator)
        elif finished:
            record.say(f"all {state.step} steps are done and {record.model} is exported")
        else:
            again = "the same command" if config.resume == "auto" else "with --resume auto it"
            record.say(f"stopped by {stop.reason} after step {state.step}; {again} goes on from here")
    return Outcome(state.step, finished, stop.reason, record.model, record.first)


def pieces(
    task: Task, state: State, plan: Plan, config: FitConfig, saver: Saver
) -> Iterator[Callable[[], None]]:
    """What is due after a step beside training."""
    record, accelerator = saver.record, saver.accelerator
    if due(state.step, config.save_every, config.steps):
        yield partial(saver.save, state)
    if config.ema_widths and due(state.step, config.snapshot_every, config.steps):
        yield partial(snapshot, state, record, accelerator)
    if config.validation_samples and due(state.step, config.validate_every, config.steps):
        yield partial(validate, task, state, plan, record, accelerator)
    if due(state.step, config.sample_every, config.steps):
        yield partial(preview, task, state, record, accelerator)


def prepare(task: Task, config: FitConfig, accelerator: Accelerator) -> tuple[State, nn.Module]:
    """The state at step 0 and the module as accelerate wraps it for precision and ranks.

    With shards, a copy of the module is cut and trained; rank 0 keeps the task's own for the averages.
    """
    plugin = sharding(accelerator.distributed_type, config.optim.optimizer)
    module = task.module.to(accelerator.device)
    if plugin is not None:
        module = copy.deepcopy(task.module)
        task.module.to("cpu" if accelerator.is_main_process else "meta")
    if config.channels_last:
        task.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.train()
    wrapped = accelerator.prepare_model(module, evaluation_mode=plugin is not None)  # then only its precision
    if plugin is not None:
        shard(module, accelerator.device, bool(plugin.reshard_after_forward))
    ema = EMA(module, classic(config.ema_decay))
    powers = {f"ema-{width:g}": EMA(module, power(width)) for width in config.ema_widths}
    return State(module, task.module, build_optimizer(module, config.optim), ema, powers), wrapped


def train_step(
    state: State,
    wrapped: nn.Module,
    batches: ReadAhead,
    plan: Plan,
    config: FitConfig,
    accelerator: Accelerator,
    record: Record,
) -> None:
    """One optimizer step on one global batch; skipped and counted if its gradients are not finite."""
    rate = learning_rate(config.optim, state.step, config.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group.get("times", 1.0)
    values: dict[str, Tensor] = {}
    for micro in range(plan.micro_batches):
        batch = {name: value.to(accelerator.device) for name, value in batches.next().items()}
        # Dropout layers, where a model has them, draw from the global generator.
        torch.manual_seed(key("layers", plan.seed, state.step, micro, accelerator.process_index))
        last = micro == plan.micro_batches - 1
        # Shards are reduced after every part: summed up first, each rank would hold gradients of all weights.
        with nullcontext() if last or state.sharded else accelerator.no_sync(wrapped):
            loss, others = wrapped(**batch)
            accelerator.backward(loss.mean() / plan.micro_batches)
        for name, value in {"loss": loss, **others}.items():
            mean = value.detach().float().mean() / plan.micro_batches
            values[name] = values[name] + mean if name in values else mean
    parameters = [p for p in state.module.parameters() if p.grad is not None]
    clip = clip_shards if state.sharded else nn.utils.clip_grad_norm_
    norm = clip(parameters, config.optim.max_grad_norm or math.inf)
    finite = bool(torch.isfinite(norm))  # the one wait for the device in a step
    if finite:
        state.optimizer.step()
        for ema in (state.ema, *state.powers.values()):
            ema.update(state.updates)
        state.updates += 1
    state.optimizer.zero_grad(set_to_none=True)
    state.bad = 0 if finite else state.bad + 1
    state.step += 1
    record.add(state.step, {**values, "grad_norm": norm.detach()}, rate, state.step - state.updates)
    if state.bad >= MAX_BAD_STEPS:
        bad = range(state.step - state.bad, state.step)
        told = record.bad_batches({step + 1: [draw.index for draw in plan.batch(step)] for step in bad})
        raise RunFailed(
            f"{state.bad} steps in a row had non-finite gradients, the last at step {state.step}{told}. The "
            f"last good checkpoint is {record.last_good or 'none'}; try a lower optim.lr, or precision: fp32"
        )


@contextmanager
def memory_advice(plan: Plan, state: State, record: Record) -> Iterator[None]:
    """Turns a device's or the machine's lack of memory into a RunFailed that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not short:
            raise
        share = plan.batch_size // plan.ranks // plan.micro_batches
        less = next((size for size in range(share // 2, 0, -1) if share % size == 0), None)
        bucket = f" of bucket {plan.turn(state.step).bucket + 1} of {len(plan.buckets)}"
        raise RunFailed(
            f"out of memory at step {state.step}, with {share} samples at a time"
            f"{bucket if len(plan.buckets) > 1 else ''} on each of {plan.ranks} ranks: "
            + (f"set micro_batch={less}, which computes the same batch in more parts" if less else ONE_SAMPLE)
            + f". The last good checkpoint is {record.last_good or 'none'} ({str(error).splitlines()[:1]})"
        ) from error


def due(step: int, every: int, steps: int) -> bool:
    """Whether a thing done every so many steps, and at the end, is due after `step`."""
    return every > 0 and (step % every == 0 or step == steps)


def cpu_only() -> bool:
    """Whether the CPU is what there is, or what `accelerate launch --cpu` asks for.

    accelerate has to be told so that ranks meet there: else each would train alone.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def warn_of_one_rank(ranks: int) -> None:
    """Say so where several ranks were asked for and one came: `accelerate launch --cpu` starts no more."""
    if ranks == 1 and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        log.warning(
            "this is one process: accelerate launch --cpu starts no more, whatever --num_processes says. For "
            "several ranks on the CPU write --multi_gpu in place of --cpu, or use torchrun"
        )


def tell_first(config: FitConfig, accelerator: Accelerator) -> None:
    """Says what of the launcher's settings and the recipe's is done otherwise.

    Raises ValueError for those that `sharding` refuses, before anything is made.
    """
    warn_of_one_rank(accelerator.num_processes)
    plugin = sharding(accelerator.distributed_type, config.optim.optimizer)
    if not accelerator.is_main_process:
        return
    warn_of_wrapping(plugin)
    asked, steps = config.optim.warmup_steps, config.steps
    if (warmup := warmup_of(config.optim, steps)) < asked:
        log.info(
            "the warm-up is %d of %d steps: optim.warmup_steps=%d is for a longer run", warmup, steps, asked
        )


def workers(config: FitConfig) -> int:
    """Threads that read ahead. On the CPU none.

    A second thread with tensors gets OpenMP threads of its own, and all of them then wait asleep instead of
    spinning: the bundled model trained at 17 instead of 29 samples/s.
    """
    if config.workers is None:
        return 0 if cpu_only() else 1
    return config.workers


def choose_precision(precision: str) -> str:
    """accelerate's name for it: bf16 only where the hardware multiplies it, since elsewhere it is slower."""
    if precision == "auto":
        native = default_dtype(torch.device("cpu" if cpu_only() else "cuda"))
        return "bf16" if native == torch.bfloat16 else "no"
    return {"fp32": "no", "bf16": "bf16"}[precision]


def make_saver(task: Task, config: FitConfig, record: Record, accelerator: Accelerator) -> Saver:
    """What writes checkpoints, and what they say of their run. On the CPU a thread takes cores that train."""
    about = {"facts": facts(task, config), "machine": machine(accelerator), "config": to_mapping(config)}
    beside = not cpu_only() if config.async_save is None else config.async_save
    return Saver(record, accelerator, about, beside)


def validate(task: Task, state: State, plan: Plan, record: Record, accelerator: Accelerator) -> None:
    """What the averaged weights make of the samples that are in no batch."""
    record.flush()
    with state.averaged():
        if accelerator.is_main_process:
            record.validation(state.step, task.validate(plan.validation))
    accelerator.wait_for_everyone()


def preview(task: Task, state: State, record: Record, accelerator: Accelerator) -> None:
    """A picture of what the averaged weights can do now."""
    with state.averaged():
        image = task.preview() if accelerator.is_main_process else None
    if image is not None:
        try:
            record.picture(state.step, image)
        except OSError as error:
            log.warning("no picture at step %d, training goes on: %s", state.step, error)
    accelerator.wait_for_everyone()


def export(task: Task, state: State, record: Record, accelerator: Accelerator) -> None:
    """The averaged weights as a model folder."""
    with state.averaged():
        if accelerator.is_main_process:
            task.export(record.model)
    if accelerator.is_main_process:
        record.mark_exported(state.step)
        record.say(f"exported {record.model}")
    accelerator.wait_for_everyone()
