"""Attention in bfloat16 on tiles: parity with float64, laws, its machine code for AMX, where it is chosen.

Without AMX the tiles are computed in plain C++: the kernel is the same.
"""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from ldm import native
from ldm.drawing.optimize import pays, use_kernels
from ldm.model.attention import BACKENDS
from ldm.model.unet import UNet
from ldm.native import build
from tests.test_native import INPUTS, QUICK, UNET, error, in_heads, randn
from tests.tiny import tiny_pipeline

HERE = Path(__file__).parent
KERNEL = Path(native.__file__).with_name("attention_bf16.cpp")
ROUNDING = 2**-8  # of bfloat16: the largest relative error is half of it


def inputs(batch: int, n: int, m: int, width: int) -> list[torch.Tensor]:
    return [randn(batch, rows, width, seed=seed).bfloat16() for seed, rows in enumerate((n, m, m))]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v in float64."""
    return F.scaled_dot_product_attention(*(in_heads(x, heads) for x in (q, k, v))).transpose(1, 2).flatten(2)


@QUICK
@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.sampled_from([1, 5, 77, 128, 300]),
    st.integers(1, 3),
    st.sampled_from([1, 8, 33, 40, 64, 80, 160]),
)
@example(1, 300, 523, 1, 40)  # two tasks
@example(1, 9, 40, 1, 512)
def test_attention_is_that_of_float64(batch, n, m, heads, width):
    q, k, v = inputs(batch, n, m, heads * width)
    answer = native.attention(q, k, v, heads)
    assert answer.shape == q.shape
    assert answer.dtype == torch.bfloat16
    assert error(answer, exact(q, k, v, heads)) < ROUNDING


def test_it_is_as_exact_as_torchs_own():
    q, k, v = inputs(1, 256, 512, 80)
    ours, torchs = (BACKENDS[name](q, k, v, 2) for name in ("native", "sdpa"))
    kernel, true = native.attention(q, k, v, 2), exact(q, k, v, 2)
    assert error(kernel, true) < 1.05 * error(torchs, true)
    assert torch.equal(ours, kernel if native.tiles() else torchs)


def test_it_reads_views_and_survives_large_scores():
    """Scores of thousands: all weight is on one key, as without the running maximum it could not be."""
    both = 40 * randn(2, 100, 3 * 64).bfloat16()
    q, k, v = both.chunk(3, dim=-1)
    assert not q.is_contiguous()
    assert error(native.attention(q, k, v, 2), exact(q, k, v, 2)) < ROUNDING


def test_weights_sum_to_one():
    """Values that are all alike come back, within what rounded weights sum to."""
    q, k, v = inputs(1, 40, 77, 64)
    assert (native.attention(q, k, torch.ones_like(v), 1).float() - 1).abs().max() <= ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_a_number_stays_so(place, dtype):
    """A query's stays its own; a key's and a value's are everybody's."""
    given = [x.to(dtype) for x in inputs(1, 40, 77, 64)]
    given[place][0, 3, 5] = torch.nan
    answer = native.attention(*given, 1).isnan()
    assert answer[0, 3, 5]
    assert answer[0, :, 5].all() == (place > 0)
    assert not answer[0, 4:, 6].any() or place == 1


def test_threads_do_not_change_a_bit():
    q, k, v = inputs(2, 333, 150, 96)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(native.attention(q, k, v, 3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(answers[0], other) for other in answers[1:])


def compiled(source: Path, to: Path, *flags: str) -> Path:
    """An object file. Skips the test where the compiler or its assembler does not know these flags."""
    command = [
        *build.find_compiler(),
        "-O2",
        *build.FLAGS.split()[1:-2],
        *flags,
        "-c",
        str(source),
        "-o",
        str(to),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode and "unrecognized" in run.stderr:
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, run.stderr
    return to


@pytest.mark.slow
def test_its_machine_code_is_that_of_amx_and_avx_512(tmp_path):
    if not shutil.which("objdump"):
        pytest.skip("needs objdump (Debian: apt install binutils)")
    made = compiled(KERNEL, tmp_path / "kernel.o", "-march=sapphirerapids")
    code = subprocess.run(["objdump", "-d", str(made)], capture_output=True, text=True, check=True).stdout
    for name in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease", "vcvtne2ps2bf16"):
        assert f"\t{name} " in code or f"\t{name}\n" in code, name


@pytest.mark.slow
def test_its_machine_code_for_amx_answers_alike_where_each_instruction_is_trapped(tmp_path):
    """Encodings, operands, strides and configurations of threads are the real ones."""
    kernel = compiled(KERNEL, tmp_path / "kernel.o", "-mamx-tile", "-mamx-bf16")
    trap = compiled(HERE / "tile_trap.cpp", tmp_path / "trap.o", "-mno-amx-tile", "-std=c++17")
    program = str(tmp_path / "trap")
    subprocess.run([*build.find_compiler(), "-fopenmp", str(trap), str(kernel), "-o", program], check=True)
    for shape in (
        (1, 32, 40, 1, 32, 1),
        (2, 70, 77, 2, 40, 2),
        (1, 5, 300, 3, 33, 3),
        (1, 300, 130, 1, 64, 2),
    ):
        batch, n, m, heads, width, _ = shape
        q, k, v = inputs(batch, n, m, heads * width)
        data = struct.pack("6q", *shape)
        data += b"".join(x.view(torch.int16).numpy().tobytes() for x in (q, k, v))
        told = subprocess.run([program], input=data, capture_output=True, check=True).stdout
        answer = torch.frombuffer(bytearray(told), dtype=torch.bfloat16).view_as(q)
        assert error(answer, exact(q, k, v, heads)) < ROUNDING, shape
        if not native.tiles():  # where a CPU has them it may add up in another order
            assert torch.equal(answer, native.attention(q, k, v, heads)), shape


@pytest.fixture
def amx(monkeypatch):
    """As on a CPU with AMX, whose tiles are computed in plain C++."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    if not native.tiles():
        monkeypatch.setattr(build.library(), "tiles", lambda: 1)
    native.tiles.cache_clear()
    yield
    native.tiles.cache_clear()


@torch.no_grad()
def test_an_optimized_unet_attends_on_tiles(amx):
    torch.manual_seed(0)
    unet = UNet(UNET)
    half = [x.bfloat16() if x.is_floating_point() else x for x in INPUTS]
    true = unet(*INPUTS).double()
    torchs = unet.bfloat16()(*half)
    use_kernels(unet)
    ours = unet(*half)
    assert not torch.equal(ours, torchs)
    assert error(ours, true) < 1.2 * error(torchs, true)


def test_a_pipeline_on_a_cpu_with_amx_is_optimized_in_bf16_unasked(amx, monkeypatch):
    pipe = tiny_pipeline().to(torch.bfloat16)
    assert not pays(pipe)
    monkeypatch.setattr("ldm.drawing.optimize.LARGE", 1000)
    assert pays(pipe)
    asked = {"height": 24, "width": 40, "num_inference_steps": 2, "seed": 5, "output_type": "pt"}
    before = pipe("a fox", **asked).images
    assert 0 < (pipe.optimize()("a fox", **asked).images - before).abs().max() < 0.05


def test_without_amx_bf16_is_left_to_torch():
    if native.tiles():
        pytest.skip("this CPU has AMX")
    with pytest.raises(ValueError, match="bfloat16 needs a CPU with AMX"):
        native.check_tiles()
    q, k, v = inputs(1, 9, 7, 64)
    assert torch.equal(BACKENDS["native"](q, k, v, 2), BACKENDS["sdpa"](q, k, v, 2))


def test_a_kernel_that_answers_wrong_is_not_used(amx, monkeypatch, caplog):
    monkeypatch.setattr("ldm.drawing.optimize.LARGE", 1000)
    monkeypatch.setattr(native, "call", lambda name, q, k, v, out, *sizes: out.fill_(0.5))
    with pytest.raises(ValueError, match=r"on AMX tiles differs from torch's by .* set CXX to another"):
        native.check_tiles()
    pipe = tiny_pipeline().to(torch.bfloat16)
    assert not pays(pipe)
    assert "drawn without native kernels" in caplog.text
    q, k, v = inputs(1, 9, 7, 64)
    assert torch.equal(BACKENDS["native"](q, k, v, 2), BACKENDS["sdpa"](q, k, v, 2))
