"""What the backward pass computes again, compiled and not: products counted, gradients compared."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._functorch.aot_autograd import aot_module_simplified
from torch.utils._python_dispatch import TorchDispatchMode

from herd.model import Llama
from herd.train.recompute import recompute
from tests.train.parallel.cases import shape

FORWARD = 7
"""Products of a layer: wq, wk, wv, wo, w1, w2, w3. The backward pass has two for each."""


class Products(TorchDispatchMode):
    """Counts the matrix products that run, one by one or in compiled graphs."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))

    def compiler(self, graph: Any, inputs: Any) -> Any:
        """Divides a layer into forward and backward pass as inductor does, and runs the two graphs as they are."""

        def count(part: Any, inputs: Any) -> Any:
            products = sum(node.target is torch.ops.aten.mm.default for node in part.graph.nodes)

            def run(*arguments: Any) -> Any:
                self.count += products
                return part(*arguments)

            return make_boxed_func(run)

        return aot_module_simplified(
            graph, inputs, fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition
        )


def gradients(what: Any, compile_it: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """Products of a forward and backward pass of one layer, and the gradients."""
    torch._dynamo.reset()
    model = Llama(shape(n_layers=1))
    model.init_weights(0)
    recompute(model, what)
    products = Products()
    if compile_it:
        model.layers[0].compile(dynamic=False, fullgraph=True, backend=products.compiler)
    tokens = torch.arange(64).view(2, 32)
    documents = (torch.arange(32) > 11).long().expand(2, -1)
    with nullcontext() if compile_it else products:  # torch compiles nothing while something watches its operators
        model.hidden(tokens, document_ids_BS=documents).square().sum().backward()
    return products.count, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("what", "again"), [("none", 0), ("selective", 0), ("full", FORWARD - 1)])
def test_products_are_computed_again_only_where_everything_is(what: str, again: int, compile_it: bool) -> None:
    """The last product of a layer, w2, is part of no gradient, so full recomputation stops before it."""
    count, found = gradients(what, compile_it)
    assert count == 3 * FORWARD + again
    _, expected = gradients("none", False)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)
