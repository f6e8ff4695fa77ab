"""Methods under their published function names: ``method_prune(model, dataloader, pruning_ratio=0.5, **kwargs)``.

``pruning_ratio`` is the fraction of MACs to remove, for every method.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from numbers import Real

from torch import nn

from hobs_rspar.compression import compress
from hobs_rspar.config import METHODS
from hobs_rspar.errors import UserError

ARGUMENTS = """

    Args:
        model: PyTorch model to prune; untouched.
        dataloader: yields (images, labels).
        pruning_ratio: fraction of MACs to remove, in [0, 1).
        **kwargs: ``protect``, ``seed``, ``sample``, ``progress``, and the method's options.

    Returns:
        The pruned model.
    """


def unpruned(model: nn.Module, dataloader=None, pruning_ratio: float = 0.0, **kwargs) -> nn.Module:
    """The model as it is: the reference of all comparisons. All arguments but the model are ignored."""
    return model


def _function(method: str) -> Callable[..., nn.Module]:
    """The published function of a method; its docstring begins as the method's does."""
    def prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, **kwargs) -> nn.Module:
        if not isinstance(pruning_ratio, Real) or not 0 <= pruning_ratio < 1:
            raise UserError("pruning_ratio is the fraction of MACs to remove and must be within [0, 1); seen: "
                            f"{pruning_ratio!r}")
        return compress(model, dataloader, macs=1 - pruning_ratio, method=method, **kwargs)[0]

    about = ast.get_docstring(ast.parse((METHODS / f"{method}.py").read_text()))
    prune.__doc__ = about.partition("\n")[0] + ARGUMENTS
    return prune


dep_graph_prune = _function("depgraph_seed")  # what the source documents call DepGraph; the paper's is depgraph_prune
taylor_prune = _function("taylor_oneshot")  # likewise; the paper's, which trains, is taylor_iterative_prune
taylor_iterative_prune = _function("taylor")
hrank_prune = _function("hrank")
decore_prune = _function("decore")
autocompress_prune = _function("autocompress")
amc_prune = _function("amc")
gnn_prune = _function("gnn")
random_prune = _function("random")
random_repair_prune = _function("random_repair")
l1_prune = _function("l1")
l1_repair_prune = _function("l1_repair")
l2_global_prune = _function("l2_global")
fpgm_prune = _function("fpgm")
lamp_prune = _function("lamp")
udfc_prune = _function("udfc")
udfc_seed_prune = _function("udfc_seed")
depgraph_prune = _function("depgraph")
jtp_prune = _function("jtp")
jtp_seed_prune = _function("jtp_seed")
bilevel_prune = _function("bilevel")
bilevel_seed_prune = _function("bilevel_seed")
structalign_prune = _function("structalign")
structalign_seed_prune = _function("structalign_seed")
scratch_prune = _function("scratch")
hobs_uniform_prune = _function("hobs_uniform")
hobs_rspar_prune = _function("hobs_rspar")
