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

# A matrix in the engine's memory, and the engine itself. Arrays are numpy's, contiguous.
def packed_bytes(format: str, rows: int, columns: int) -> int: ...
def product(format: str, data: Any, rows: int, columns: int, x: Any, y: Any) -> None: ...
def unpacked(format: str, data: Any, out: Any) -> None: ...
def read_bandwidth(bytes: int, threads: int, rounds: int) -> float: ...
def product_peak(threads: int) -> tuple[float, float]: ...

class Cache:
    def __init__(
        self, type: str, layers: int, heads: int, head_dim: int, page_tokens: int, pages: int
    ) -> None: ...
    def copy_page(self, source: int, target: int) -> None: ...
    @property
    def page_bytes(self) -> int: ...

class Engine:
    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        vocab: int,
        norm_eps: float,
        qk_norm: bool,
        temperature: float,
        temperature_floor: int,
        experts: int,
        top_k: int,
        rotates: list[bool],
        chunks: list[int],
        matrices: list[tuple[str, str, int, int]],
        threads: int,
        cpus: list[int],
    ) -> None: ...
    def load(self, name: str, data: Any) -> None: ...
    def load_norm(self, name: str, data: Any) -> None: ...
    def ready(self) -> None: ...
    def add_adapter(self) -> int: ...
    def remove_adapter(self, adapter: int) -> None: ...
    def load_delta(self, adapter: int, layer: int, matrix: str, a: Any, b: Any) -> None: ...
    def step(
        self,
        cache: Cache,
        tokens: Any,
        spans: Any,
        pages: Any,
        cosine: Any,
        sine: Any,
        wanted: Any,
        logits: Any | None = None,
        states: Any | None = None,
        targets: Any | None = None,
        log_probabilities: Any | None = None,
    ) -> bool: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def work_bytes(self) -> int: ...
    @property
    def threads(self) -> int: ...
