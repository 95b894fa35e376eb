"""CPU time of every attention lowering, forward and forward + backward, on the shapes of small training runs.

    python benchmarks/attention.py [--threads 1] [--repeats 7]

Columns are milliseconds of process CPU time, the median of interleaved repeats. "dense" and "causal" are
torch's own kernel with a whole mask and with its causal flag: the peers. The last column is the better of them over
"native", forward + backward. Row "documents" packs about four documents into each row. The lowering that `attend`
chooses is marked with *.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from herd.model import LOWERINGS, AttentionMask, attend, native_attention
from herd.model.attention import choose_lowering
from herd.model.attention_mask import KeyRanges

# batch, query heads, key heads, sequence, head width
SHAPES = [
    (8, 4, 4, 512, 32),
    (8, 8, 4, 512, 32),
    (8, 4, 2, 512, 64),
    (8, 8, 8, 512, 64),
    (16, 8, 4, 256, 32),
    (4, 8, 4, 1024, 64),
]


def once(name: str, inputs: tuple[Tensor, ...], grad: Tensor, ranges: KeyRanges, *, backward: bool) -> float:
    """Milliseconds of CPU time of one call."""
    start = time.process_time()
    with torch.set_grad_enabled(backward):
        out = attend(inputs[0], inputs[1], inputs[2], ranges, lowering=name)
    if backward:
        torch.autograd.grad(out, inputs, grad)
    return 1e3 * (time.process_time() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), ms of CPU time: forward / forward + backward\n")
    print("| B H G S K | type | mask | " + " | ".join(LOWERINGS) + " | torch / native |")
    print("|---|---|---|" + "---|" * (len(LOWERINGS) + 1))
    for batch, heads, kv_heads, length, width in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
            q, k, v, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
            inputs = tuple(x.requires_grad_() for x in (q, k, v))
            ids_BS = (torch.rand(batch, length, generator=generator) < 3 / length).cumsum(1)
            for mask_name, mask in (("causal", AttentionMask()), ("documents", AttentionMask(document_ids_BS=ids_BS))):
                ranges = mask.key_ranges(length)
                names = [name for name in LOWERINGS if name != "causal" or ranges.plain_causal]
                names.remove("varlen")  # on GPUs only
                if not native_attention.available(q):
                    names.remove("native")
                times: dict[tuple[str, bool], list[float]] = {(n, b): [] for n in names for b in (False, True)}
                for repeat in range(arguments.repeats + 1):
                    for (name, backward), measured in times.items():
                        taken = once(name, inputs, grad, ranges, backward=backward)
                        if repeat:  # the first round warms up
                            measured.append(taken)
                chosen = choose_lowering(q, k, ranges)
                cells = [
                    f"{statistics.median(times[n, False]):.0f} / {statistics.median(times[n, True]):.0f}"
                    + ("*" if n == chosen else "")
                    if n in names
                    else "-"
                    for n in LOWERINGS
                ]
                peer = min(statistics.median(times[n, True]) for n in ("dense", "causal") if n in names)
                ratio = f"{peer / statistics.median(times['native', True]):.1f}×" if "native" in names else "not built"
                shape = f"{batch} {heads} {kv_heads} {length} {width}"
                print(f"| {shape} | {str(dtype)[6:]} | {mask_name} | " + " | ".join([*cells, ratio]) + " |", flush=True)


if __name__ == "__main__":
    main()
