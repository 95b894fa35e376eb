"""How fast this machine multiplies matrices: the denominator of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import statistics
import time

import torch

from herd.errors import UsageError

SHAPE = (1024, 1024, 1024)
"""Rows, depth, columns: small enough for a few milliseconds on a laptop, large enough to reach the plateau."""
GPU_SHAPE = (8192, 8192, 8192)


AGAIN = 3


class Peak:
    """The peak of a device, measured when it is first asked for; and again, a few times at most, where a run is faster
    than it: something else was running then."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._rate, self._measured = 0.0, 0

    def share(self, rate: float) -> float:
        """`rate`, in floating-point operations a second, as a share of the peak."""
        if not self._measured or (rate > self._rate and self._measured <= AGAIN):
            self._rate = max(self._rate, matmul_peak(self._dtype, self._device))
            self._measured += 1
        return rate / self._rate


def matmul_peak(
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    shape: tuple[int, int, int] | None = None,
    trials: int = 9,
) -> float:
    """Floating-point operations a second of x @ w.T, the best of `trials` runs with the current threads.

    The best and not the median, since whatever else runs on the machine only ever takes away. Raises UsageError for
    numbers that are not floating-point.
    """
    if not dtype.is_floating_point:
        raise UsageError("the peak is measured on floating-point numbers", value=dtype, allowed="float32, bfloat16")
    device = torch.device(device)
    m, k, n = shape or (GPU_SHAPE if device.type == "cuda" else SHAPE)
    x = torch.randn(m, k, device=device).to(dtype)
    w = torch.randn(n, k, device=device).to(dtype)
    return 2.0 * m * k * n / min(_trials(x, w, trials))


def matmul_rate(
    m: int, k: int, n: int, dtype: torch.dtype, device: torch.device | str = "cpu", trials: int = 9
) -> float:
    """Median floating-point operations a second for one shape."""
    x = torch.randn(m, k, device=device).to(dtype)
    w = torch.randn(n, k, device=device).to(dtype)
    return 2.0 * m * k * n / statistics.median(_trials(x, w, trials))


def _trials(x: torch.Tensor, w: torch.Tensor, trials: int) -> list[float]:
    seconds = []
    for trial in range(trials + 2):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        if x.is_cuda:
            torch.cuda.synchronize()
        if trial > 1:
            seconds.append(time.perf_counter() - start)
    return seconds
