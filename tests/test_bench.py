"""Every bench runs and prints its table, at a size at which its figures say nothing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.kernels import group_of

ROOT = Path(__file__).resolve().parent.parent
BENCHES = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if "def main()" in path.read_text())
SMALL = ["--steps", "1", "--rounds", "1", "--threads", "1"]
# The smallest run of each, and a row of its table. What is in neither table only has to show its --help.
RUNS = {
    "train_speed": (
        [*SMALL, "--batch", "2", "--pixels", "32", "--channels", "32,64"],
        "| diffusers, encoding each batch |",
    ),
    "cpu_generate": (
        [*SMALL, "--size", "64", "--channels", "32,64", "--rows", "fp32, channels_last"],
        "| diffusers, fp32, channels_last |",
    ),
    "gpu_generate": (
        ["--device", "cpu", "--tiny", "--rows", "CUDA graph of a step"],
        "| ours, CUDA graph of a step | needs CUDA |",
    ),
    "attention": (["--device", "cpu", "--size", "64", "--rounds", "1"], "| 1 x 1 x 64 x 64 x 512 | 1 |"),
    "decoding": (["--tiny", "--threads", "1"], "| 64 | in strips |"),
    "ranks": (["ldm/bundled", "--batch", "2", "--steps", "1"], '{"seconds": '),
}


def run(name: str, *options: str) -> str:
    """What a bench prints; it must end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, f"bench/{name}.py", *options]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_cudnn", "convolution"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, ...>", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matmul"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_nn", "matmul"),
        ("aten::bmm", "matmul"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float, ...>", "norm"),
        ("triton_per_fused_native_group_norm_silu_3", "norm"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "optimizer"),
        ("aten::_foreach_lerp_", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "elementwise"),
        ("triton_poi_fused_add_convert_element_type_7", "elementwise"),
        ("aten::slice", "other"),
    ],
)
def test_a_kernel_has_its_group(name, group):
    assert group_of(name) == group


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_bench_runs(name):
    options, row = RUNS[name]
    assert row in run(name, *options)


@pytest.mark.slow
def test_curves_are_drawn(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed: pip install -c constraints.txt '.[bench]'")
    run("curves", "--tiny", "--threads", "1", "--output", str(tmp_path), "--curves", "steps", "encoding")
    page = (tmp_path / "curves.md").read_text()
    pictures = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert pictures == ["encoding", "time-steps"]
    assert all(f"({name}.png)" in page for name in pictures)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BENCHES if name not in RUNS])
def test_a_bench_explains_itself(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"bench.{name}").main()
    assert end.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out
