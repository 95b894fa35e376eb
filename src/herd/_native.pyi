from typing import Any

def cpu_features() -> dict[str, bool]: ...
def cpu_name() -> str: ...
def usable_cpus() -> int: ...
def isa() -> str: ...

# Arrays are torch or numpy: float32, or bfloat16 viewed as uint16.
def attention_forward(
    q_BSHK: Any, k_BSGK: Any, v_BSGK: Any, first_BS: Any, scale: float, o_BSHK: Any, lse_BHS: Any, threads: int
) -> None: ...
def attention_backward(
    q_BSHK: Any,
    k_BSGK: Any,
    v_BSGK: Any,
    first_BS: Any,
    scale: float,
    o_BSHK: Any,
    grad_o_BSHK: Any,
    lse_BHS: Any,
    grad_q_BSHK: Any,
    grad_k_BSGK: Any,
    grad_v_BSGK: Any,
    threads: int,
) -> None: ...
def attention_isa(bf16: bool) -> str: ...

# weights [R, N] and importance [N] are float32, out is uint8.
def quantize(format: str, weights: Any, importance: Any | None, out: Any, threads: int) -> bool: ...
