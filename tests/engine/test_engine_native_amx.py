"""The AMX kernels give the bits of the AVX-512 VNNI ones, where AMX is emulated too (amx_emulated.cpp)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

native = pytest.importorskip("herd._native")

# As in CMakeLists.txt: both sets must be compiled alike, for the compiler decides which roundings are fused.
FLAGS = (
    "-std=c++20 -O3 -ffp-contract=fast -fno-math-errno -Wno-uninitialized -Wno-maybe-uninitialized -Inative/include "
    "-mavx512f -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512 -mf16c -mavx512vnni -mavx512bf16"
)
SOURCES = ("native/kernels/engine_amx.cpp", "native/kernels/engine_avx512_vnni.cpp", "tests/engine/amx_emulated.cpp")


@pytest.mark.slow
def test_amx_kernels_give_the_bits_of_the_vnni_ones(repository: Path, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        pytest.skip("no C++ compiler")
    if sys.platform != "linux" or not native.cpu_features().get("avx512_vnni"):
        pytest.skip("needs Linux and a processor with AVX-512 VNNI")
    program = str(tmp_path / "amx_emulated")
    subprocess.run([compiler, *FLAGS.split(), *SOURCES, "-o", program], cwd=repository, check=True, timeout=300)
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert native.cpu_features()["amx_int8"] or ", 0 tile instructions" not in result.stdout
