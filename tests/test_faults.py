"""The faults that a training can meet: a table of the tests that say what each leads to; the missing ones.

Faults of data have a table of their own, in test_data_faults.py.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from PIL import Image
from torch import Tensor

from tests.test_fit import Toy, diffusion_recipe, losses, state, toy_config
from train.batches.plan import Draw
from train.command import command
from train.fit.checkpoint import list_checkpoints, load_checkpoint
from train.fit.failure import RunFailed
from train.fit.loop import fit
from train.stages import train_stages

FAULTS = {
    "1 kill -9 between saves": (
        "test_train_scripts.test_an_end_between_saves_loses_steps_and_nothing_else",
        "test_fit.test_resuming_drops_metrics_after_the_checkpoint",
    ),
    "2 kill -9 within a save": (
        "test_train_scripts.test_an_end_between_saves_loses_steps_and_nothing_else",
        "test_train_checkpoint.test_rotation_keeps_the_newest_and_removes_what_a_kill_left",
    ),
    "3 SIGTERM": ("test_fit.test_20_steps_equal_7_and_resume_and_13",),
    "4 SIGTERM to the launcher": (
        "test_train_scripts.test_a_launcher_that_is_told_to_stop_takes_the_training_with_it",
    ),
    "5 Ctrl-C twice": ("test_train_scripts.test_an_end_between_saves_loses_steps_and_nothing_else",),
    "6 full disk at a save": (
        "test_faults.test_a_disk_that_is_full_for_a_while",
        "test_fit.test_a_full_disk_does_not_end_the_run_but_the_last_save_does",
        "test_train_checkpoint.test_full_disk_leaves_older_checkpoints_and_nothing_else",
    ),
    "7 full disk at the last save": (
        "test_faults.test_a_disk_that_stays_full",
        "test_fit.test_the_last_state_of_a_full_disk_goes_elsewhere",
    ),
    "8 damaged checkpoint": ("test_train_checkpoint.test_damage_is_skipped_by_auto_and_refused_by_name",),
    "9 output that cannot be written": (
        "test_faults.test_a_folder_that_nobody_can_write_is_refused_before_training",
        "test_fit.test_an_output_that_cannot_be_is_refused_before_training",
    ),
    "10 rotation to one": ("test_fit.test_rotation_to_one_checkpoint_never_leaves_none",),
    "11 changed recipe": (
        "test_fit.test_another_run_is_not_gone_on_with",
        "test_fit.test_changed_settings_are_told",
    ),
    "12 resumed at its end": ("test_fit.test_a_finished_run_says_so_and_writes_a_missing_export",),
    "13 two runs in a folder": (
        "test_fit.test_two_runs_do_not_share_a_folder",
        "test_faults.test_a_lock_says_whose_it_is_and_a_stale_one_is_none",
    ),
    "14 gradients that are not finite": (
        "test_fit.test_non_finite_gradients_are_skipped_and_counted",
        "test_faults.test_ten_bad_steps_leave_the_list_of_their_samples",
    ),
    "15 out of memory": (
        "test_fit.test_out_of_memory_says_what_to_do",
        "test_faults.test_memory_that_is_not_there_costs_a_few_steps",
    ),
    "16 reader that fails or is killed": (
        # readers are threads: what kills one kills the process, which is fault 1
        "test_fit.test_a_reader_that_fails_ends_the_run_with_its_own_words",
        "test_train_scripts.test_an_end_between_saves_loses_steps_and_nothing_else",
    ),
    "17 rank that dies": ("test_train_scripts.test_a_rank_that_dies_ends_the_others_and_the_run_goes_on",),
    "18 clock set back": ("test_faults.test_the_clock_names_and_orders_nothing",),
    "19 tracker that is not reached": (
        "test_faults.test_a_tracker_that_is_lost_on_the_way_costs_nothing_else",
        "test_fit.test_a_failing_tracker_is_left_out",
    ),
    "20 step that hangs": ("test_watchdog.test_a_run_that_hangs_says_where_and_ends",),
    "21 mistakes in a recipe": (
        "test_config.test_mistakes_are_named",
        "test_config.test_values_out_of_range_are_refused_before_anything_is_made",
        "test_config.test_a_command_shows_one_line_for_what_the_user_got_wrong",
    ),
    "22 numbers that do not fit each other": (
        "test_config.test_values_out_of_range_are_refused_before_anything_is_made",
        "test_plan.test_what_does_not_divide_is_refused",
        "test_faults.test_batches_that_ranks_cannot_share_are_refused_before_the_first_stage",
    ),
    "23 averages that are not there": (
        "test_fit.test_the_width_of_the_average_is_chosen_afterwards",
        "test_ema.test_errors",
    ),
}


def test_no_fault_is_left_out():
    assert [int(fault.split()[0]) for fault in FAULTS] == list(range(1, 24))


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_tests(fault):
    for name in FAULTS[fault]:
        module, _, test = name.partition(".")
        assert hasattr(importlib.import_module(f"tests.{module}"), test), name


class Heavy(Toy):
    """A toy whose checkpoints are larger than all else that it writes; disk: what happens at which step."""

    def __init__(self, disk: dict[int, int] | None = None) -> None:
        super().__init__()
        self.module.register_buffer("ballast", torch.zeros(50_000))
        self.disk = disk or {}

    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        if draws[0].step in self.disk:
            limit_files(self.disk[draws[0].step])
        return super().batch(draws)


def limit_files(size: int) -> None:
    """From now on the system refuses to write beyond so many bytes of any file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


FULL, FREE = 50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[0]


@pytest.fixture
def space() -> Iterator[None]:
    """Files may be of any size again afterwards."""
    yield
    limit_files(FREE)


def test_a_disk_that_is_full_for_a_while(tmp_path, space, caplog):
    """The system itself refuses the save of step 12; that of step 18 is made, and nothing else is another."""
    fit(Heavy({8: FULL, 14: FREE}), toy_config(tmp_path / "run", keep_last=9))
    fit(Heavy(), toy_config(tmp_path / "whole", keep_last=9))
    assert caplog.text.count("training goes on") == 1
    assert re.search(r"no checkpoint at step 12, training goes on: .*File too large", caplog.text)
    names = [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert names == ["step-00000006", "step-00000018", "step-00000020"]
    assert state(tmp_path / "run", 20) == state(tmp_path / "whole", 20)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_disk_that_stays_full(tmp_path, space, capsys, monkeypatch):
    """The end is an error that says what is left; nothing half-written lies anywhere, and the run goes on."""
    monkeypatch.setattr("sys.argv", ["train"])
    run = toy_config(tmp_path / "run", emergency_output=str(tmp_path / "other"))
    with pytest.raises(SystemExit) as end:
        command(lambda argv: fit(Heavy({8: FULL}), run).exit_code)
    limit_files(FREE)
    assert end.value.code == 2
    left = tmp_path / "run/checkpoints/step-00000006"
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: the last state could not be saved: .*File too large.*; nor in emergency", told)
    assert told.endswith(f"the newest good checkpoint is {left}")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [left.name]
    assert not list((tmp_path / "other").iterdir())
    fit(Heavy(), run)
    fit(Heavy(), toy_config(tmp_path / "whole"))
    assert state(tmp_path / "run", 20) == state(tmp_path / "whole", 20)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="/proc is what not even root can write files to")
def test_a_folder_that_nobody_can_write_is_refused_before_training(tmp_path):
    """The run's own, one that is not there and cannot be, and that of the checkpoints alone."""
    for name, target in (("linked", "/proc"), ("file", tmp_path / "a file")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoints").symlink_to(target)
    (tmp_path / "a file").touch()
    for output in (Path("/proc"), Path("/proc/run"), tmp_path / "linked", tmp_path / "file"):
        task = Toy()
        with pytest.raises(ValueError, match=f"output={output} cannot be written: "):
            fit(task, toy_config(output))
        assert task.seen == []


def test_a_lock_says_whose_it_is_and_a_stale_one_is_none(tmp_path):
    """What a killed run leaves is a file that nobody holds."""
    (tmp_path / "lock").write_text("process 1 on a machine that was switched off")

    class Nested(Toy):
        def preview(self) -> Image.Image:
            with pytest.raises(
                ValueError, match=rf"another run is writing .*: process {os.getpid()} on \S+; "
            ):
                fit(Toy(), toy_config(tmp_path))
            return super().preview()

    assert fit(Nested(), toy_config(tmp_path)).finished


def test_ten_bad_steps_leave_the_list_of_their_samples(tmp_path):
    """Also where the run was resumed among them; and the checkpoint before goes on with better data."""
    task = Toy(poison=lambda step: step >= 7)
    for seen in (7 * 4, 0):
        listed = tmp_path / "bad_batches.json"
        listed.unlink(missing_ok=True)
        message = rf"step 17; their samples are listed in {listed}\. The last .* is .*step-00000012;"
        with pytest.raises(RunFailed, match=message):
            fit(task, toy_config(tmp_path))
        steps = json.loads(listed.read_text())["steps"]
        assert [one["step"] for one in steps] == list(range(8, 18))
        samples = [index for one in steps for index in one["samples"]]
        assert samples[-5 * 4 :] == task.seen[-5 * 4 :]
        assert not seen or samples == task.seen[seen:]
        task.seen = []
    weight = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1]).tensors["model"]["linear.weight"]
    assert weight.isfinite().all()
    assert fit(Toy(), toy_config(tmp_path)).finished


def test_memory_that_is_not_there_costs_a_few_steps(tmp_path):
    """The system itself refuses it: the message names the bucket, and the advice works."""

    class Greedy(Toy):
        def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
            if draws[0].step == 8:
                self.module.forward = lambda x: torch.empty(1 << 60)  # type: ignore[method-assign]
            return super().batch(draws)

    def buckets(task: Toy) -> Toy:
        task.buckets = [range(6), range(6, 10)]
        return task

    message = (
        r"step 8, with 4 samples at a time of bucket [12] of 2 on .*: set micro_batch=2, .*step-00000006"
    )
    with pytest.raises(RunFailed, match=message):
        fit(buckets(Greedy()), toy_config(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]
    assert fit(buckets(Toy()), toy_config(tmp_path, micro_batch=2)).finished
    with pytest.raises(RunFailed, match=r"with 5 samples at a time on .*: set micro_batch=1, which"):
        fit(Greedy(), toy_config(tmp_path / "odd", batch_size=5))
    with pytest.raises(RunFailed, match=r"with 1 samples at a time on .*: set gradient_checkpointing where"):
        fit(Greedy(), toy_config(tmp_path / "one", batch_size=1))


def test_the_clock_names_and_orders_nothing(tmp_path, monkeypatch):
    """It stands still while two runs begin, and is set back by a day for the second half of one of them.

    By the times of their folders, the newest checkpoint is the oldest.
    """
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    fit(Toy(), toy_config(tmp_path / "whole"))
    fit(Toy(stop_after=7), toy_config(tmp_path / "run"))
    monkeypatch.setattr(time, "time", lambda: 1.7e9 - 86_400)
    older, newer = list_checkpoints(tmp_path / "run/checkpoints")
    os.utime(newer, (1.6e9, 1.6e9))
    assert older.stat().st_mtime > newer.stat().st_mtime
    assert fit(Toy(), toy_config(tmp_path / "run")).first == 7
    assert state(tmp_path / "run", 20) == state(tmp_path / "whole", 20)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    files = [
        {path.relative_to(folder) for path in folder.rglob("*")}
        for folder in (tmp_path / "run", tmp_path / "whole")
    ]
    assert files[0] == files[1]


class Lost:
    """A tracker that takes what comes until step 5."""

    name = "wandb"

    def __init__(self) -> None:
        self.told: list[int] = []

    def log(self, values: dict[str, Any], step: int, **options: Any) -> None:
        if step > 5:
            raise ConnectionError("unreachable")
        self.told.append(step)

    def log_images(self, values: dict[str, Any], step: int) -> None:
        raise ConnectionError("unreachable")

    def finish(self) -> None:
        raise ConnectionError("unreachable")


@pytest.mark.filterwarnings("ignore:.*no supported trackers are currently installed")
def test_a_tracker_that_is_lost_on_the_way_costs_nothing_else(tmp_path, monkeypatch, caplog):
    tracker = Lost()
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name: setattr(self, "trackers", [tracker]))
    options = {"log_every": 1, "validation_samples": 2, "validate_every": 10}
    fit(Toy(), toy_config(tmp_path / "run", tracker="wandb", **options))
    assert tracker.told == [1, 2, 3, 4, 5]
    assert "wandb fails and is left out, metrics.jsonl goes on: unreachable" in caplog.text
    assert "wandb did not finish: unreachable" in caplog.text
    assert caplog.text.count("unreachable") == 2
    fit(Toy(), toy_config(tmp_path / "whole", **options))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert state(tmp_path / "run", 20) == state(tmp_path / "whole", 20)


def test_batches_that_ranks_cannot_share_are_refused_before_the_first_stage(tmp_path, monkeypatch):
    """Else the autoencoder would be trained before the UNet's batch is looked at."""
    recipe = diffusion_recipe(tmp_path / "run", batch_size=4, autoencoder="configs/shapes-autoencoder.yaml")
    PartialState(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 3)
    with pytest.raises(ValueError, match=r"batch_size=4 is not divisible by 3 ranks: use 3 or 6"):
        next(train_stages(recipe))
    assert not (tmp_path / "run").exists()
