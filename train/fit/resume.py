"""Going on from a checkpoint: what must be as it was, what may be another and is told, and other data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ldm.files.config import replacing
from train.config import to_mapping
from train.data.source import changed_pictures
from train.fit.checkpoint import Checkpoint, find_checkpoint
from train.fit.record import Record
from train.fit.shards import wants_shards
from train.fit.state import FitConfig, State, Task

OF_DATA = ("buckets", "data", "samples")  # the facts that accept_new_data lets differ


def facts(task: Task, config: FitConfig) -> dict[str, Any]:
    """What a resumed run must share with the run it goes on from."""
    samples = sum(map(len, task.buckets)) - config.validation_samples
    return {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "samples": samples,
        "ema_widths": list(config.ema_widths),
        **task.facts,
    }


def resume(state: State, task: Task, config: FitConfig, record: Record, accelerator: Accelerator) -> None:
    """Put the newest checkpoint, if there is one, into `state`. Raises ValueError if it is of another run."""
    checkpoint, now = find_checkpoint(record.checkpoints, config.resume), facts(task, config)
    differ = differing(checkpoint, now) if checkpoint else []
    accepted = bool(differ) and config.accept_new_data and set(differ) <= set(OF_DATA)
    if checkpoint and differ and not accepted:
        raise refusal(checkpoint, now, differ)
    if accelerator.is_main_process:
        keep_contents(record.folder, now, task.contents())
    if checkpoint is None:
        record.start(0, None)
        return
    changed = differences(checkpoint.state["config"], to_mapping(config))
    if changed:
        record.say("goes on with changed settings:\n" + "\n".join(changed))
    saved_on = {"shards": 1, **checkpoint.state["machine"]}  # older ones do not say
    for name, value in machine(accelerator).items():
        if saved_on.get(name) != value:
            before = saved_on.get(name)
            record.say(f"resumed with {name} {value}, saved with {before}: not bit for bit the same run")
    state.load(checkpoint)
    if accepted:
        state.data_since, state.bad = state.step, 0
        record.say(new_data(checkpoint, now, differ, record.folder))
    record.start(state.step, checkpoint.path)


def differing(checkpoint: Checkpoint, now: Mapping[str, Any]) -> list[str]:
    """The facts of a checkpoint that hold no longer."""
    then = checkpoint.state["facts"]
    return sorted(name for name in then if not agree(then[name], now.get(name)))


def rows(checkpoint: Checkpoint, now: Mapping[str, Any], differ: list[str]) -> str:
    """A line for each fact that is another."""
    then = checkpoint.state["facts"]
    return "\n".join(f"  {name}: {then.get(name, '-')} then, {now.get(name, '-')} now" for name in differ)


def refusal(checkpoint: Checkpoint, now: Mapping[str, Any], differ: list[str]) -> ValueError:
    """Why the run does not go on, and what to do."""
    other = ""
    if set(differ) <= set(OF_DATA):
        other = "\nor go on with the pictures that there are now: --accept-new-data"
    elif set(differ) & set(OF_DATA):
        other = f"\n--accept-new-data lets {', '.join(OF_DATA)} differ, not a tokenizer learned from the data"
    return ValueError(
        f"{checkpoint.path} is of another run; set these back or choose another output:\n"
        f"{rows(checkpoint, now, differ)}{other}"
    )


def new_data(checkpoint: Checkpoint, now: Mapping[str, Any], differ: list[str], folder: Path) -> str:
    """What --accept-new-data has accepted."""
    lines = rows(checkpoint, now, differ)
    before, after = (contents_file(folder, facts) for facts in (checkpoint.state["facts"], now))
    if before.exists() and after.exists():
        lines += "\n" + changed_pictures(*(json.loads(path.read_text("utf-8")) for path in (before, after)))
    return (
        f"goes on from step {checkpoint.step} with new data, an epoch of which begins; what is held out for "
        f"validation is chosen anew, so pictures that were trained on may be among it:\n{lines}"
    )


def contents_file(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Where a run keeps what it knows of each picture of its data, by the hash of that data's description."""
    return folder / "pictures" / f"{hashlib.sha256(str(facts.get('data')).encode()).hexdigest()[:16]}.json"


def keep_contents(folder: Path, facts: Mapping[str, Any], contents: Mapping[str, str]) -> None:
    """Note the pictures of a run's data, so that it can be told later which of them changed."""
    path = contents_file(folder, facts)
    if contents and not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(contents, indent=0), encoding="utf-8")


def agree(then: Any, now: Any) -> bool:
    """Whether a fact of a checkpoint still holds. What it does not mention was added since, and is off."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        return all(name in now and agree(value, now[name]) for name, value in then.items())
    return bool(then == now)


def differences(then: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """A line for each setting, at any depth, that two mappings do not share."""
    lines = []
    for name in sorted(then.keys() | now.keys()):
        old, new = then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{where}{name}.")
        elif old != new:
            lines.append(f"  {where}{name}: {old} then, {new} now")
    return lines


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """What decides the last bits of a sum."""
    return {
        "torch": torch.__version__,
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
        "ranks": accelerator.num_processes,
        "shards": accelerator.num_processes if wants_shards(accelerator.distributed_type) else 1,
        "threads": torch.get_num_threads(),
    }
