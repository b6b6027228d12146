"""Linear maps in bytes: exact sums at odd sizes, no overflow, small errors, pictures beside float32's."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.drawing.optimize import use_int8, use_kernels
from ldm.model.attention import SpatialTransformer
from ldm.model.unet import UNet
from ldm.native import build, int8
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.picture import read_recipe
from tests.test_native import INPUTS, QUICK, UNET, error, randn
from tests.tiny import tiny_pipeline

try:
    int8.check()
except ValueError as reason:
    pytest.skip(str(reason), allow_module_level=True)


def of_bytes(weight: torch.Tensor) -> torch.Tensor:
    """The weights that the bytes stand for, in float64."""
    whole, scale = int8.quantized(weight, int8.together())
    return whole * scale.double()[:, None]


@QUICK
@given(
    st.integers(1, 300), st.sampled_from([32, 96, 320, 544]), st.sampled_from([64, 192, 576]), st.booleans()
)
def test_the_sums_are_exact(rows, channels, out, biased):
    """Of rows that bytes hold without loss; what is left is the rounding of the answer to float32."""
    x, weight = int8.exact_rows(randn(rows, channels)), randn(out, channels, seed=1) / channels**0.5
    bias = randn(out, seed=2) if biased else None
    true = F.linear(x.double(), of_bytes(weight), None if bias is None else bias.double())
    assert error(int8.linear(x, int8.pack(weight, bias)), true) < 3e-7
    left, right = true.chunk(2, dim=-1)
    assert error(int8.linear(x, int8.pack(weight, bias, gated=True)), left * F.gelu(right)) < 1e-6


@pytest.mark.parametrize("signs", ["+", "-", "+-", "++--", "++++----"])
@pytest.mark.parametrize("together", [0, 8])
def test_no_sum_overflows(signs, together):
    """Weights of one size, in rows of the greatest bytes at those of one sign and the least at the others."""
    weight = torch.tensor([1.0 if each == "+" else -1.0 for each in signs]).repeat(5120 // len(signs))
    weight = weight.repeat(64, 1)
    whole, _ = int8.quantized(weight, together)
    if together:
        meet = int8.meeting(whole.int(), together)
        assert 120 <= meet.clamp(min=0).sum(-1).max().maximum(-meet.clamp(max=0).sum(-1).min()) <= 128
    x = torch.where(torch.stack([weight[0] > 0, weight[0] < 0, weight[0] != 0]), int8.BYTE / 16 - 8, -8.0)
    x[:, 0], x[:, 8] = -8, int8.BYTE / 16 - 8
    true = F.linear(x.double(), of_bytes(weight))
    assert (int8.linear(x, int8.pack(weight, None)) - true).abs().max() < 1e-6 * true.abs().max()


def test_the_weights_that_meet_are_bounded_and_their_rounding_is_half_a_unit():
    weight = randn(40, 333) * torch.arange(40)[:, None]
    weight[7, 20] = 1000.0
    for together in (0, 8):
        whole, scale = int8.quantized(weight, together)
        assert ((whole * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
        assert whole.abs().amax(1)[1:].min() > 20
    meet = int8.meeting(whole.int(), 8)
    assert meet.clamp(min=0).sum(-1).max() <= 128
    assert meet.clamp(max=0).sum(-1).min() >= -128


def test_an_answer_is_near_that_of_float32():
    """Rows in 8 bits and weights in 6 or more: 2 % of the answer, of any size."""
    x, weight = randn(2, 70, 320) * torch.logspace(-6, 6, 70)[:, None], randn(96, 320, seed=1)
    true, answer = F.linear(x.double(), weight.double()), int8.linear(x, int8.pack(weight, None))
    assert answer.shape == true.shape
    assert 0 < ((answer - true).norm(dim=-1) / true.norm(dim=-1)).max() < 0.03


def test_flat_rows_are_exact_and_what_is_not_a_number_stays_so():
    weight, x = randn(32, 64), torch.full((3, 64), 2.5)
    weights = int8.pack(weight, None)
    assert error(int8.linear(x, weights), F.linear(x.double(), of_bytes(weight))) < 1e-6
    x[0, 5], x[2, 63] = torch.nan, torch.inf
    assert int8.linear(x, weights).isfinite().all(1).tolist() == [False, True, False]
    assert not int8.linear(x, int8.pack(torch.zeros(32, 64), None))[1].any()


def test_threads_do_not_change_a_bit():
    x, weights = randn(333, 160), int8.pack(randn(1088, 160), randn(1088), gated=True)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(int8.linear(x, weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(answers[0], other) for other in answers[1:])


def test_weights_are_packed_anew_when_they_change():
    layer, x = torch.nn.Linear(32, 64).requires_grad_(False), randn(5, 32)
    packed = int8.Packed(layer)
    first = packed()
    assert packed() is first
    layer.load_state_dict({"weight": randn(64, 32), "bias": randn(64)})
    assert error(int8.linear(x, packed()), layer(x).double()) < 0.03
    layer.bias = torch.nn.Parameter(randn(64, seed=9))
    assert error(int8.linear(x, packed()), layer(x).double()) < 0.03


def test_weights_in_the_place_of_others_are_packed_anew():
    """As an adapter's can be, which are made where those of another were."""
    place = randn(64, 32).numpy()
    layer, x = torch.nn.Linear(32, 64).requires_grad_(False), randn(5, 32)
    packed = int8.Packed(layer)
    for seed in (1, 2):
        place[:] = randn(64, 32, seed=seed).numpy()  # which counts as no change
        layer.weight = torch.nn.Parameter(torch.from_numpy(place), requires_grad=False)
        assert error(int8.linear(x, packed()), layer(x).double()) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["haswell", "skylake-avx512", "cascadelake", "alderlake"])
def test_the_kernel_is_of_the_instructions_for_it(cpu, tmp_path):
    """Compiled for CPUs that may not be here: AVX2, AVX-512, and either with sums in 32 bits at once."""
    source, out = build.HERE / "int8.cpp", tmp_path / "int8.s"
    flags = [f"-march={cpu}" if each == "-march=native" else each for each in build.FLAGS.split()]
    flags = ["-O1" if each == "-O3" else each for each in flags if each != "-shared"]
    subprocess.run([*build.find_compiler(), *flags, "-S", str(source), "-o", str(out)], check=True)
    text = out.read_text()
    assert ("vpdpbusd" in text) == (cpu in ("cascadelake", "alderlake"))
    assert ("zmm" in text) == (cpu in ("skylake-avx512", "cascadelake"))


@torch.no_grad()
def test_a_unet_in_bytes_is_near_its_own_and_keeps_its_weights():
    torch.manual_seed(0)
    unet = UNet(UNET)
    before, names = unet(*INPUTS), list(unet.state_dict())
    use_kernels(unet)
    use_int8(unet)
    after = unet(*INPUTS)
    assert 1e-4 < error(after, before.double()) < 0.04
    assert list(unet.state_dict()) == names
    chosen = [name for name, part in unet.named_modules() if "in_bytes" in str(vars(part).get("forward"))]
    assert len(chosen) == 11 * sum(isinstance(part, SpatialTransformer) for part in unet.modules())
    assert not any("attn2.to_k" in name or "attn2.to_v" in name or "time" in name for name in chosen)
    use_kernels(unet)
    assert error(unet(*INPUTS), before.double()) < 1e-5


@pytest.mark.parametrize(
    ("count", "steps"), [(2, 4), pytest.param(6, 12, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_the_bundled_models_pictures_stay(count, steps):
    """Within 35 dB of float32's, the same seeds: 4.5 of 255 in the root of the mean square."""
    subjects, places = (
        ("red fox", "cat", "two blue cars", "small green boat"),
        ("in snow", "at night", "on a beach"),
    )
    prompts = [f"a {subjects[i % 4]} {places[i % 3]}" for i in range(count)]
    asked = {"num_inference_steps": steps, "seed": list(range(count)), "output_type": "pt"}
    pipe = LatentDiffusionPipeline.bundled(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    plain, coarse = pipe(prompts, **asked).images, pipe.optimize(quantize="int8")(prompts, **asked).images
    ratio = -10 * (plain - coarse).square().mean((1, 2, 3)).log10()
    assert 35 < ratio.min() < 80


def test_a_picture_in_bytes_says_so_and_is_drawn_again(tmp_path, monkeypatch, capsys):
    from ldm import generate

    tiny_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    first = [
        "a fox",
        "--model",
        "model",
        "--quantize=int8",
        "--width=40",
        "--height=24",
        "--steps=2",
        "--seed=3",
    ]
    again = ["--from", "first.png", "--output", "again.png", "--model", "model"]
    for arguments in ([*first, "--output", "first.png"], again):
        assert generate.main(arguments) == 0
    recipe = read_recipe(tmp_path / "again.png")
    assert recipe == read_recipe(tmp_path / "first.png")
    assert recipe.quantize == "int8"
    assert recipe.optimize
    pictures = [Image.open(tmp_path / f"{name}.png").tobytes() for name in ("first", "again")]
    assert pictures[0] == pictures[1]
    assert capsys.readouterr().err == ""
    assert generate.main([*again, "--no-optimize", "--overwrite"]) == 2
    assert "quantize=int8 is a part of optimize: leave out --no-optimize" in capsys.readouterr().err


def test_where_it_cannot_be_it_says_so_and_changes_nothing(monkeypatch):
    pipe = tiny_pipeline()
    monkeypatch.setattr(int8, "library", lambda: SimpleNamespace(int8_width=lambda: 0))
    int8.check.cache_clear()
    with pytest.raises(ValueError, match="for x86 with AVX2, and this CPU has none; leave int8 out"):
        pipe.optimize(quantize="int8")
    int8.check.cache_clear()
    assert not pipe.optimized
    assert "forward" not in vars(pipe.unet.conv_out)
