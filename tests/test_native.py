"""The native kernels: parity with float64 at odd sizes, laws, what they leave alone, and their build."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from ldm import native
from ldm.drawing.optimize import pays, use_kernels
from ldm.model.unet import UNet, UNetConfig
from ldm.native import build
from ldm.native.memory import LEAST, Pool
from ldm.recipes.picture import read_recipe
from tests.tiny import tiny_pipeline

try:
    build.version(build.find_compiler())
except ValueError as error:  # whatever else is wrong is to be seen
    pytest.skip(str(error), allow_module_level=True)

QUICK = settings(max_examples=25, deadline=None, derandomize=True)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(ours: torch.Tensor, true: torch.Tensor) -> float:
    """Relative, in the 2-norm."""
    return ((ours.double() - true).norm() / true.norm()).item()


def in_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.double().unflatten(-1, (heads, -1)).transpose(1, 2)


@QUICK
@given(
    st.integers(1, 3),
    st.integers(1, 19),
    st.integers(1, 19),
    st.sampled_from([32, 64, 96, 320]),
    st.sampled_from([32, 96, 160]),
    st.booleans(),
)
def test_a_convolution_is_that_of_float64(batch, height, width, channels, out, biased):
    x, w = randn(batch, channels, height, width), randn(out, channels, 3, 3, seed=1)
    bias = randn(out, seed=2) if biased else None
    true = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), padding=1)
    answer = native.convolution(x, w, bias)
    assert answer.shape == true.shape
    assert answer.is_contiguous(memory_format=torch.channels_last)
    assert error(answer, true) < 1e-5


@pytest.mark.slow
def test_a_convolution_takes_any_layout_and_many_blocks():
    """9,216 tiles of 32 channels are more than one block of the cache."""
    x, w = randn(1, 32, 384, 384), randn(32, 32, 3, 3, seed=1)
    answer = native.convolution(x, w, None)
    assert error(answer, F.conv2d(x.double(), w.double(), padding=1)) < 1e-5
    last = (each.contiguous(memory_format=torch.channels_last) for each in (x, w))
    assert torch.equal(answer, native.convolution(*last, None))


@QUICK
@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.sampled_from([1, 5, 77, 256, 300, 523]),
    st.integers(1, 4),
    st.sampled_from([1, 8, 24, 33, 40, 64, 80, 160]),
)
def test_attention_is_that_of_float64(batch, n, m, heads, width):
    q, k, v = (
        randn(batch, n, heads * width),
        randn(batch, m, heads * width, seed=1),
        randn(batch, m, heads * width, seed=2),
    )
    true = F.scaled_dot_product_attention(*(in_heads(x, heads) for x in (q, k, v)))
    answer = native.attention(q, k, v, heads)
    assert answer.shape == q.shape
    assert error(answer, true.transpose(1, 2).flatten(2)) < 3e-6


def test_attention_reads_views_and_survives_large_scores():
    """Scores of thousands: all weight is on one key, as without the running maximum it could not be."""
    both = 40 * randn(2, 100, 3 * 64)
    q, k, v = both.chunk(3, dim=-1)
    assert not q.is_contiguous()
    true = F.scaled_dot_product_attention(*(in_heads(x, 2) for x in (q, k, v)))
    assert error(native.attention(q, k, v, 2), true.transpose(1, 2).flatten(2)) < 1e-4


@QUICK
@given(
    st.integers(1, 500), st.sampled_from([32, 96, 320, 544]), st.sampled_from([64, 192, 320]), st.booleans()
)
def test_a_linear_map_is_that_of_float64(rows, channels, out, biased):
    x, w = randn(rows, channels), randn(out, channels, seed=1) / channels**0.5
    bias = randn(out, seed=2) if biased else None
    true = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    assert error(native.linear(x, w, bias), true) < 1e-6
    left, right = true.chunk(2, dim=-1)
    assert error(native.linear(x, w, bias, gated=True), left * F.gelu(right)) < 1e-6


@QUICK
@given(
    st.integers(1, 3),
    st.integers(2, 23),
    st.integers(1, 23),
    st.sampled_from([(32, 32), (32, 8), (96, 32), (320, 32)]),
    st.sampled_from([0.0, 1000.0]),
    st.booleans(),
)
def test_a_norm_is_that_of_float64(batch, height, width, sizes, mean, shifted):
    """Also where the mean is a thousand deviations: E[x^2] - E[x]^2 in float32 would be lost."""
    channels, groups = sizes
    x, w, b = randn(batch, channels, height, width) + mean, randn(channels, seed=1), randn(channels, seed=2)
    added = randn(batch, channels, seed=3) if shifted else None
    double = x.double() if added is None else x.double() + added.double()[:, :, None, None]
    true = F.silu(F.group_norm(double, groups, w.double(), b.double(), 1e-5))
    answer = native.norm_silu(x, groups, w, b, 1e-5, added)
    assert error(answer, true) < (1e-6 if mean == 0 else 1e-3)


def test_what_is_not_a_number_stays_so():
    """A kernel that hid it would hide a model's overflow."""
    x = randn(1, 32, 8, 8)
    x[0, 3, 5, 5] = torch.nan
    assert native.convolution(x, randn(32, 32, 3, 3), None)[0, :, 4:7, 4:7].isnan().all()
    tokens = x.flatten(2).transpose(1, 2)
    assert native.norm_silu(x, 4, torch.ones(32), torch.ones(32), 1e-5)[0, :8].isnan().all()
    assert native.linear(tokens, randn(32, 32), None).isnan().any()
    assert native.attention(randn(1, 3, 32), randn(1, 64, 32), tokens, 2).isnan().any()


def test_threads_do_not_change_a_bit():
    x, w = randn(2, 64, 33, 21), randn(64, 64, 3, 3)
    q, matrix = randn(2, 333, 96), randn(64, 96)
    kernels = (
        lambda: native.convolution(x, w, None),
        lambda: native.attention(q, q, q, 3),
        lambda: native.norm_silu(x, 4, x[0, :, 0, 0].contiguous(), x[0, :, 0, 1].contiguous(), 1e-5),
        lambda: native.linear(q, matrix, None),
    )
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append([kernel() for kernel in kernels])
    finally:
        torch.set_num_threads(before)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))


def test_calls_from_several_threads_at_once_are_apart():
    x, w = randn(2, 64, 40, 40), randn(64, 64, 3, 3)
    true = native.convolution(x, w, None)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: native.convolution(x, w, None), range(12)))
    assert all(torch.equal(answer, true) for answer in answers)


UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(32, 64),
    cross_attention_dim=32,
    attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
INPUTS = (randn(2, 4, 9, 7), torch.tensor([3, 900]), randn(2, 5, 32, seed=3))


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(UNET)


@torch.no_grad()
def test_an_optimized_unet_answers_alike(unet):
    before, names = unet(*INPUTS), list(unet.state_dict())
    use_kernels(unet)
    after = unet(*INPUTS)
    assert 0 < error(after, before.double()) < 1e-5
    assert list(unet.state_dict()) == names
    use_kernels(unet)
    assert torch.equal(unet(*INPUTS), after)
    other = UNet(UNET)
    unet.load_state_dict(other.state_dict())  # nothing of the old weights was kept
    assert error(unet(*INPUTS), other(*INPUTS).double()) < 1e-5


def test_gradients_and_other_types_are_left_to_torch(unet):
    torch.manual_seed(0)
    plain = UNet(UNET)
    use_kernels(unet)
    for model in (plain, unet):
        model(*INPUTS).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), unet.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(*INPUTS), unet(*INPUTS))
    with torch.no_grad():
        double = [x.double() if x.is_floating_point() else x for x in INPUTS]
        assert torch.equal(plain.double()(*double), unet.double()(*double))


@torch.no_grad()
def test_an_optimized_autoencoder_answers_alike():
    config = AutoencoderKLConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    torch.manual_seed(0)
    vae, image = AutoencoderKL(config), randn(2, 3, 18, 22)
    mean = vae.encode(image).mean
    before = mean, vae.decode(mean)
    use_kernels(vae)
    for a, b in zip((vae.encode(image).mean, vae.decode(mean)), before, strict=True):
        assert 0 < error(a, b.double()) < 1e-5


@pytest.mark.slow
def test_an_optimized_pipeline_draws_the_same_picture_again_and_says_so(tmp_path, monkeypatch, capsys):
    from ldm import generate

    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    asked = {"height": 24, "width": 40, "num_inference_steps": 3, "seed": 5, "output_type": "pt"}
    plain, fast = (each("a fox", **asked).images for each in (pipe, tiny_pipeline().optimize()))
    assert 0 < (plain - fast).abs().max() < 1 / 255
    monkeypatch.chdir(tmp_path)
    first = ["a fox", "--model", "model", "--optimize", "--width=40", "--height=24", "--steps=3"]
    again = ["--from", "first.png", "--output", "again.png", "--model", "model"]
    for arguments in ([*first, "--output", "first.png"], again):
        assert generate.main(arguments) == 0
    assert read_recipe(tmp_path / "again.png") == read_recipe(tmp_path / "first.png")
    assert read_recipe(tmp_path / "again.png").optimize
    pictures = [Image.open(tmp_path / f"{name}.png").tobytes() for name in ("first", "again")]
    assert pictures[0] == pictures[1]
    assert capsys.readouterr().err == ""


def test_large_models_on_a_cpu_are_optimized_unasked(monkeypatch):
    pipe = tiny_pipeline()
    assert not pays(pipe)
    monkeypatch.setattr("ldm.drawing.optimize.LARGE", 1000)
    assert pays(pipe)
    assert not pays(tiny_pipeline().to(torch.float16))
    monkeypatch.setattr(native, "check", lambda: (_ for _ in ()).throw(ValueError("no compiler")))
    assert not pays(pipe)


def test_memory_is_used_again_when_the_last_view_is_gone():
    pool = Pool()
    first = pool.empty(3, LEAST)
    first[1] = 7.0
    place, view = first.data_ptr(), first[1]
    assert place % 64 == 0
    del first
    other = pool.empty(3, LEAST)
    assert other.data_ptr() != place  # `view` still holds it
    other.zero_()
    assert (view == 7).all()
    del view
    again = pool.empty(3, LEAST - 5)  # a little smaller: it fits
    assert again.data_ptr() == place
    assert again.shape == (3, LEAST - 5)
    assert again.is_contiguous()
    assert pool.empty(4).shape == (4,)  # small ones are torch's


def test_memory_of_sizes_that_are_not_asked_for_any_more_is_let_go():
    pool = Pool()
    for rows in range(1, 8):
        pool.empty(4**rows % 97 + rows, LEAST)
    assert sum(map(len, pool.idle)) <= 2 * 104 * LEAST
    held = [pool.empty(2, LEAST) for _ in range(5)]
    assert len({each.data_ptr() for each in held}) == 5


FAULTS = """
import resource, sys, torch
from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from ldm.native.memory import keep_pages

if "keep" in sys.argv and not keep_pages():
    sys.exit("not glibc")
torch.manual_seed(0)
kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(32, 64), layers_per_block=1, **kinds))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
with torch.no_grad():
    each = [faults()]
    for _ in range(6):
        vae.decode(torch.ones(1, 4, 256, 64))
        each.append(faults())
print(min(after - before for before, after in zip(each[1:], each[2:])))
"""


@pytest.mark.slow
def test_a_decode_asks_the_system_for_no_memory_again():
    """Every page that it asks for anew is a fault. The best of some: at first what is kept lies in pieces."""
    root, faults = Path(__file__).parents[1], []
    for how in ("plain", "keep"):
        command = [sys.executable, "-c", FAULTS, how]
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if "not glibc" in run.stderr:
            pytest.skip("the C library is not glibc")
        assert run.returncode == 0, run.stderr
        faults.append(int(run.stdout))
    plain, kept = faults
    assert kept < plain / 4


def test_what_cannot_be_optimized_says_why():
    with pytest.raises(ValueError, match=r"for float32 and the models are torch.float16.*--dtype fp32"):
        tiny_pipeline().to(torch.float16).optimize()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library yet, an own folder for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    native.check.cache_clear()
    yield tmp_path
    build.library.cache_clear()
    native.check.cache_clear()


def test_without_a_compiler_it_says_what_to_do(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no C\+\+ compiler 'no-such-compiler'; install g\+\+"):
        native.check()
    with pytest.raises(ValueError, match="attention backend 'native' cannot run: native kernels"):
        UNet(UNET).set_attention_backend("native")
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(ValueError, match=r"expected GCC, and .* says 'Python"):
        native.check()


@pytest.mark.slow
def test_a_failed_build_leaves_nothing_and_tells_what_the_compiler_said(fresh, monkeypatch):
    monkeypatch.setattr(build, "FLAGS", build.FLAGS + " -Dload=1")
    with pytest.raises(ValueError, match=r"g\+\+ failed \(.*error"):
        native.check()
    assert not list((fresh / "ldm").iterdir())


def test_a_folder_that_cannot_be_written_is_named(fresh, monkeypatch):
    (fresh / "ldm").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot be written .*set XDG_CACHE_HOME"):
        native.check()


@pytest.mark.slow
def test_the_library_is_built_once_by_however_many(fresh):
    code = "from ldm import native; native.check()"
    root = Path(__file__).parents[1]
    run = [subprocess.Popen([sys.executable, "-c", code], cwd=root, env=dict(os.environ)) for _ in range(3)]
    assert [process.wait() for process in run] == [0, 0, 0]
    (kept,) = (fresh / "ldm").iterdir()
    before = kept.stat().st_mtime_ns
    native.check()
    assert kept.stat().st_mtime_ns == before
