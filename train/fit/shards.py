"""Weights in shards (FSDP2, torch's fully_shard): a rank holds rows of every matrix, and of its gradient,
averages and optimizer state, and has a block whole only while it computes with it.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it. accelerate itself shards on CUDA only and chooses
the blocks by its own rules; here it is done by us, the same on CUDA and on the CPU. Checkpoints and exports
are those of any other run: whole tensors by name, gathered one after another.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, distributed, nn

from autoencoder.layers import AttentionBlock, ResnetBlock
from ldm.model.attention import SpatialTransformer
from text_encoder.clip import Layer

if TYPE_CHECKING:
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.tensor import DTensor

log = logging.getLogger(__name__)
BLOCKS = (ResnetBlock, AttentionBlock, SpatialTransformer, Layer)  # gathered and freed one at a time
WHOLE_ONLY = ("adamw8bit", "muon")  # optimizers that do not go by single numbers


def wants_shards(kind: DistributedType) -> bool:
    """Whether the launcher asks for FSDP, and there are ranks. accelerate itself says so on CUDA only."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and kind.value != "NO"


def sharding(kind: DistributedType, optimizer: str) -> FullyShardedDataParallelPlugin | None:
    """What the launcher asks for; None where every rank has a copy of all weights.

    Raises ValueError for what cuts weights in another way, and for what does not go with shards.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate is configured for {kind.value}, which cuts weights and optimizer its own way: its "
            "checkpoints would not be whole. Use accelerate launch --multi_gpu, which copies them, or "
            "--use_fsdp --fsdp_version 2, which cuts them"
        )
    if not wants_shards(kind):
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version={plugin.fsdp_version}: expected accelerate launch --fsdp_version 2")
    asked = {
        "fsdp_offload_params": bool(parse_flag_from_env("FSDP_OFFLOAD_PARAMS")),
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,  # the recipe has its own
        "fsdp_ignored_modules": plugin.ignored_modules,
    }
    for name, value in asked.items():
        if value:
            raise ValueError(f"{name}={value} is not done here: leave it out")
    if optimizer in WHOLE_ONLY:
        raise ValueError(
            f"optim.optimizer={optimizer} works on whole matrices or blocks of them, and FSDP cuts them: "
            "use adamw, or accelerate launch --multi_gpu"
        )
    return plugin


def warn_of_wrapping(plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Say so where the launcher names blocks to wrap, as `accelerate config` asks it to: ours stay BLOCKS."""
    if plugin is not None and plugin.auto_wrap_policy is not None:
        asked, ours = os.environ.get("FSDP_AUTO_WRAP_POLICY"), ", ".join(kind.__name__ for kind in BLOCKS)
        log.warning("fsdp_auto_wrap_policy=%s has no effect: the blocks are always %s", asked, ours)


def shard(module: nn.Module, device: torch.device, reshard: bool) -> None:
    """Cut the weights of `module`, the same on all ranks, by rows: block by block, then what is left.

    reshard: free a block after its forward and gather it again for its backward. What has no rows, a single
    number, stays whole on every rank, and its gradient is averaged here.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    single = {p for p in module.parameters() if not p.ndim}
    for block in [part for part in module.modules() if isinstance(part, BLOCKS)]:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, ignored_params=single)
    fully_shard(module, mesh=mesh, ignored_params=single)
    for p in single:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(average)


def average(p: Tensor) -> None:
    """The mean of the gradient over the ranks. What earlier micro-batches left in it is the same on all."""
    assert p.grad is not None
    distributed.all_reduce(p.grad)
    p.grad /= distributed.get_world_size()


def in_shards(value: Tensor) -> bool:
    return hasattr(value, "placements")  # a DTensor, whose module takes seconds to import


def local(value: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory; all of it where it is whole."""
    return cast("DTensor", value).to_local() if in_shards(value) else value


def cut(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank has, in the shards of `like`; as it is where `like` is whole."""
    if not in_shards(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded = cast("DTensor", like)
    return distribute_tensor(
        value.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None
    )


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whole, by all ranks together: on the CPU of rank 0. Others get only what is not in shards.

    One at a time, so that no device holds more than one of them beside its shards.
    """
    result = {}
    for name, value in tensors.items():
        if in_shards(value):
            whole = cast("DTensor", value).full_tensor()
            if distributed.get_rank() == 0:
                result[name] = whole.detach().cpu()
        else:
            result[name] = value
    return result


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm over all ranks is at most max_norm; returns what it was, ()."""
    gradients: list[Any] = [p.grad for p in parameters]
    parts, single = [local(g) for g in gradients if in_shards(g)], [g for g in gradients if not in_shards(g)]
    square = torch.stack([part.square().sum() for part in parts]).sum()
    distributed.all_reduce(square)
    norm = (square + sum(g.square().sum() for g in single)).sqrt()
    torch._foreach_mul_([*parts, *single], (max_norm / (norm + 1e-6)).clamp(max=1))
    return norm
