"""What a run is made of: its settings, its task, and all that changes while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, distributed, nn

from train.batches.plan import Draw
from train.fit.checkpoint import Checkpoint
from train.fit.ema import EMA, classic, exponent
from train.fit.optim import OptimConfig, load_optimizer_tensors, optimizer_tensors
from train.fit.shards import cut, gather, local
from train.fit.stop import EXIT_RESUMABLE


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The run: how long, how large the batch, where to and how often it writes."""

    output: str  # folder of the run: checkpoints, metrics.jsonl, samples, the exported model
    steps: int  # optimizer steps
    batch_size: int  # samples an optimizer step, over all ranks
    micro_batch: int = 0  # samples a rank computes at a time; 0: its whole share of the batch
    seed: int = 0  # of sample order, noise, timesteps, caption choice and initial weights
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema_decay: float = 0.999  # a step, reached slowly; 0: export the last weights
    ema_widths: tuple[float, ...] = ()  # of averages for train/rebuild_ema.py, as [0.05, 0.1]
    snapshot_every: int = 500  # optimizer steps between snapshots of those averages
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the computation; auto: bf16 where it is native
    channels_last: bool = True  # memory layout of the convolutions
    workers: int | None = None  # threads that read ahead; 0: read in the loop; null: 0 on the CPU, else 1
    accept_new_data: bool = False  # go on though pictures came or went, with an epoch of those there are now
    resume: str = "auto"  # auto: the newest intact checkpoint; none: only if there is none; or a path
    max_minutes: float | None = None  # of the process; then save and exit 75
    watchdog_minutes: float | None = 30.0  # without progress; then all stacks and exit 76; null: never
    save_every: int = 500  # optimizer steps between checkpoints
    async_save: bool | None = None  # write them beside the training, from a copy; null: on CUDA only
    keep_last: int = 2  # checkpoints kept
    emergency_output: str | None = None  # folder for the last state where output is full; then --resume it
    sample_every: int = 500  # optimizer steps between pictures; 0: none
    validation_samples: int = 0  # held out of training; the loss on them says whether it learns by heart
    validate_every: int = 500  # optimizer steps between validations, by the averaged weights
    log_every: int = 20  # optimizer steps between lines of progress
    plan: bool = False  # print what the run will take, from a probe of 20 steps, and end
    price: float = 0.0  # of an hour of one rank, in any currency, for plan
    tracker: str | None = None  # beside metrics.jsonl: tensorboard, wandb or another that accelerate knows

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "save_every",
            "keep_last",
            "validate_every",
            "snapshot_every",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        for name in ("micro_batch", "workers", "sample_every", "validation_samples"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch={self.micro_batch} does not divide batch_size={self.batch_size}")
        classic(self.ema_decay)
        for width in self.ema_widths:
            exponent(width)
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes={self.max_minutes}: expected more than 0")
        if self.watchdog_minutes is not None and not self.watchdog_minutes > 0:
            raise ValueError(f"watchdog_minutes={self.watchdog_minutes}: expected more than 0, or null")
        if not self.price >= 0:
            raise ValueError(f"price={self.price}: expected 0 or more an hour")
        if not self.output:
            raise ValueError("output is empty: name the folder of the run")


class Task(Protocol):
    """What is trained. `module(**batch)` returns the loss (B,) and further named values (B,) to log."""

    module: nn.Module

    @property
    def buckets(self) -> Sequence[Sequence[int]]: ...  # samples of each shape; a batch is of one

    facts: Mapping[str, Any]  # JSON; what may not change when a run is resumed: shapes, data, objective

    def contents(self) -> Mapping[str, str]: ...  # a hash of each picture, by name; none where they have none
    def batch(self, draws: list[Draw]) -> dict[str, Tensor]: ...  # on the CPU; may run in another thread
    def validate(self, buckets: Sequence[Sequence[int]]) -> Mapping[str, float]: ...  # always the same noise
    def preview(self) -> Image.Image: ...  # with the weights that the module holds now
    def export(self, folder: Path) -> None: ...


class Outcome(NamedTuple):
    """How a run ended."""

    step: int
    finished: bool
    reason: str  # why it stopped early
    model: Path  # the exported folder, when finished
    first: int = 0  # the step it went on from

    @property
    def exit_code(self) -> int:
        return 0 if self.finished else EXIT_RESUMABLE


@dataclass
class State:
    """All that changes during a run."""

    module: nn.Module  # in training; with shards each rank holds its own of it
    whole: nn.Module  # the task's: the same module or, with shards, on rank 0 a copy that `averaged` fills
    optimizer: torch.optim.Optimizer
    ema: EMA
    powers: dict[str, EMA] = field(default_factory=dict)  # by the name of their file
    step: int = 0  # batches seen
    updates: int = 0  # optimizer steps made; fewer than `step` where gradients were not finite
    bad: int = 0  # non-finite gradients in a row
    data_since: int = 0  # batches seen before the data was what it is: its first epoch begins there

    @property
    def sharded(self) -> bool:
        return self.whole is not self.module

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block, which all ranks enter, `whole` holds the averaged weights on rank 0, for use."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.filled() if self.sharded else self.ema.applied())
            self.whole.eval()
            yield
            self.whole.train()

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Within the block rank 0's copy holds the averages, on the device; then it is on the CPU again."""
        values = gather({**self.module.state_dict(), **self.ema.state_dict()})
        if distributed.get_rank() == 0:
            self.whole.load_state_dict(values)
            self.whole.to(local(next(self.module.parameters())).device)
        yield
        if distributed.get_rank() == 0:
            self.whole.to("cpu")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All of it as rank 0 saves it. With shards all ranks gather it together."""
        groups = {
            "model": self.module.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.module),
            **{name: ema.state_dict() for name, ema in self.powers.items()},
        }
        return {name: gather(group) for name, group in groups.items()}

    def load(self, checkpoint: Checkpoint) -> None:
        own, saved = self.module.state_dict(), checkpoint.tensors["model"]
        differ = sorted(own.keys() ^ saved.keys())
        if differ:
            raise ValueError(
                f"{checkpoint.path} is of a module with other parts: {len(differ)} tensors are in one "
                f"of both only, the first is {differ[0]}; set the recipe back or choose another output"
            )
        self.module.load_state_dict({name: cut(value, own[name]) for name, value in saved.items()})
        self.ema.load_state_dict(checkpoint.tensors["ema"])
        for name, ema in self.powers.items():
            ema.load_state_dict(checkpoint.tensors[name])
        load_optimizer_tensors(self.optimizer, self.module, checkpoint.tensors["optimizer"])
        self.step, self.updates = checkpoint.step, checkpoint.state["updates"]
        self.bad = checkpoint.state["bad"]
        self.data_since = checkpoint.state.get("data_since", 0)  # older checkpoints know no other
