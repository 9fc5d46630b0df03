"""Rewrites of a traced graph before it is split.

A pass is a function that changes a graph in place and returns how often it has found its pattern.
It may add inputs, and then says where these are found. What a pass needs to know of a value is in
the node's `meta["example_value"]`, which it gives to the nodes that it adds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import fx

from minisrv.compile.passes.fused_attention import fuse_attention
from minisrv.compile.passes.fused_gates import fuse_gates
from minisrv.compile.passes.fused_norms import fuse_norms
from minisrv.compile.passes.merged_projections import merge_projections
from minisrv.compile.passes.no_op_views import remove_no_op_views
from minisrv.compile.passes.normed_products import add_normed_products
from minisrv.compile.passes.residual_adds import add_to_residuals
from minisrv.compile.trace import Trace
from minisrv.compile.values import Source

Pass = Callable[[fx.Graph, dict[str, Source]], int]

PASSES: dict[str, Pass] = {
    "no-op views": remove_no_op_views,
    "merged projections": merge_projections,
    "products added to residuals": add_to_residuals,
    "normed products added to residuals": add_normed_products,
    "norms in products": fuse_norms,
    "gates in products": fuse_gates,
    "norms and rotations in attention": fuse_attention,
}
"""All passes by name, in the order in which they are applied."""


def apply_passes(traced: Trace, names: Collection[str] | None = None) -> dict[str, int]:
    """Apply passes to the graph of a trace in their order, and return the number of matches of
    each.

    names: the passes that are applied; None for all.
    """
    return {
        name: rewrite(traced.graph.graph, traced.sources)
        for name, rewrite in PASSES.items()
        if names is None or name in names
    }
