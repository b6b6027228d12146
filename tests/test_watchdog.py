"""Signs of life: the heartbeat, and the end of a run that hangs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import nn

from tests.test_fit import Toy, toy_config
from train.fit.loop import fit
from train.fit.watchdog import EXIT_HUNG, Watchdog

ROOT = Path(__file__).parent.parent
HANGS = """
import sys, threading, time
from pathlib import Path
from train.fit.watchdog import Watchdog

def wait_for_a_disk():
    time.sleep(60)

with Watchdog(Path(sys.argv[1]), 0.5 / 60, rank=1) as dog:
    for step in range(6):  # more than the limit in all, less at a time
        time.sleep(0.15)
        dog.beat(step)
    with dog.piece(step):
        time.sleep(0.8)
    threading.Thread(target=wait_for_a_disk, daemon=True).start()
    wait_for_a_disk()
"""


@pytest.mark.slow
def test_a_run_that_hangs_says_where_and_ends(tmp_path):
    """Rank 1 waits for rank 0's piece longer than the limit, and is not ended for that."""
    begin = time.monotonic()
    command = [sys.executable, "-c", HANGS, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == EXIT_HUNG == 76
    assert time.monotonic() - begin > 2.2
    stacks = (tmp_path / "stacks-rank1.txt").read_text()
    for text in (done.stderr, stacks):
        assert text.startswith("hung: 0.00833333 minutes without progress after step 5 (watchdog_minutes)")
        assert text.count("in wait_for_a_disk") == 2
    assert not (tmp_path / "heartbeat.json").exists()  # that is rank 0's


def test_the_heartbeat_of_a_run(tmp_path):
    fit(Toy(), toy_config(tmp_path, steps=4))
    heartbeat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert 1 <= heartbeat["step"] <= 4  # written at most every few seconds
    assert abs(heartbeat["time"] - time.time()) < 60
    assert not list(tmp_path.glob("heartbeat.tmp*"))


def test_answers_of_the_model_are_progress_and_a_full_disk_is_none_of_its_business(tmp_path, caplog):
    layer = nn.Linear(1, 1)
    with Watchdog(tmp_path / "absent", None, rank=0) as dog:
        dog.listen(layer)
        layer(layer.weight)
        assert dog.beats == 1
        dog.beat(3)
    layer(layer.weight)
    assert dog.beats == 2
    assert "no heartbeat at step 3, training goes on" in caplog.text


def test_a_limit_of_no_time_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"watchdog_minutes=0: expected more than 0, or null"):
        toy_config(tmp_path, watchdog_minutes=0)
