"""The suite runs offline, without torchvision, from fixed seeds; what a machine lacks skips and says why."""

import os
import random
import sys

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
# None makes `import torchvision` fail, and makes diffusers and transformers see that it is not installed.
sys.modules["torchvision"] = None  # type: ignore[assignment]

from pathlib import Path

import numpy as np
import pytest
import torch

from train.data.sprites import find_font

# Tests' tensors are small: more threads than two only wait for each other.
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU or the emoji font where there is none."""
    absent = {}
    if not torch.cuda.is_available():
        absent["gpu"] = "needs a CUDA device, and this machine has none"
    try:
        find_font()
    except ValueError as error:
        absent["font"] = str(error)
    for item in items:
        for name, reason in absent.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if sys.modules["torchvision"] is not None:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print("\ntorchvision was imported: nothing here may need it")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same seeds, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # for libraries that draw from the global generator
    torch.manual_seed(0)


@pytest.fixture
def font() -> Path:
    """The Noto Color Emoji font; skips where it is not installed."""
    try:
        return find_font()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def tiny_pipeline():
    """A whole pipeline with random weights, small enough to draw in a fraction of a second."""
    from tests.tiny import tiny_pipeline

    return tiny_pipeline(seed=0)
