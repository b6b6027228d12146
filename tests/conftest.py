"""The suite runs offline, without torchvision, from fixed seeds; what a machine lacks skips and says why."""

import os
import random
import sys

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
# Side by side, as `pytest -n auto` runs them, tests share the cores, and so do the programs that they start.
if WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // WORKERS, 1)))
# None makes `import torchvision` fail, and makes diffusers and transformers see that it is not installed.
sys.modules["torchvision"] = None  # type: ignore[assignment]

from collections.abc import Iterator
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


@pytest.fixture(autouse=True, scope="session")
def no_torchvision() -> Iterator[None]:
    """The last test of a run in which something imported torchvision ends in an error."""
    yield
    assert sys.modules["torchvision"] is None, "torchvision was imported: nothing here may need it"


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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a pipeline, one for all tests of a file."""
    from tests.tiny import tiny_pipeline

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder
