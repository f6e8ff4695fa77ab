"""Methods under their published function names: ``method_prune(model, dataloader, pruning_ratio=0.5, **kwargs)``.

``pruning_ratio`` is the fraction of MACs to remove, for every method.
"""

from __future__ import annotations

from torch import nn

from hobs_rspar.compression import compress
from hobs_rspar.errors import UserError


def _prune(method: str, model: nn.Module, dataloader, pruning_ratio: float, options: dict) -> nn.Module:
    if not 0 <= pruning_ratio < 1:
        raise UserError("pruning_ratio is the fraction of MACs to remove and must be within [0, 1); seen: "
                        f"{pruning_ratio}")
    return compress(model, dataloader, macs=1 - pruning_ratio, method=method, **options)[0]


def unpruned(model: nn.Module, dataloader=None, pruning_ratio: float = 0.0, **kwargs) -> nn.Module:
    """The model as it is: the reference of all comparisons. All arguments but the model are ignored."""
    return model


def dep_graph_prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, **kwargs) -> nn.Module:
    """DepGraph as the source documents describe it: group L2 norm, uniform widths, no sparse training.

    Args:
        model: PyTorch model to prune; untouched.
        dataloader: yields (images, labels).
        pruning_ratio: fraction of MACs to remove, in [0, 1).
        **kwargs: ``protect``, ``seed``.

    Returns:
        The pruned model.
    """
    return _prune("depgraph_seed", model, dataloader, pruning_ratio, kwargs)


def taylor_prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, **kwargs) -> nn.Module:
    """Taylor pruning in one shot (Molchanov et al. 2019, without the iterations). Arguments as ``dep_graph_prune``."""
    return _prune("taylor_oneshot", model, dataloader, pruning_ratio, kwargs)


def random_prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, **kwargs) -> nn.Module:
    """Random channels at uniform widths. Arguments as ``dep_graph_prune``."""
    return _prune("random", model, dataloader, pruning_ratio, kwargs)


def random_repair_prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, **kwargs) -> nn.Module:
    """The channels of ``random_prune``, with least-squares repair. Arguments as ``dep_graph_prune``."""
    return _prune("random_repair", model, dataloader, pruning_ratio, kwargs)


def l1_prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, **kwargs) -> nn.Module:
    """L1 norm of filters at uniform widths (Li et al. 2017). Arguments as ``dep_graph_prune``."""
    return _prune("l1", model, dataloader, pruning_ratio, kwargs)


def l1_repair_prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, **kwargs) -> nn.Module:
    """The channels of ``l1_prune``, with least-squares repair. Arguments as ``dep_graph_prune``."""
    return _prune("l1_repair", model, dataloader, pruning_ratio, kwargs)


def l2_global_prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, **kwargs) -> nn.Module:
    """L2 norm of filters, one threshold for all groups. Arguments as ``dep_graph_prune``."""
    return _prune("l2_global", model, dataloader, pruning_ratio, kwargs)


def fpgm_prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, **kwargs) -> nn.Module:
    """Filters nearest to the geometric median of their layer go (He et al. 2019). Arguments as ``dep_graph_prune``."""
    return _prune("fpgm", model, dataloader, pruning_ratio, kwargs)


def lamp_prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, **kwargs) -> nn.Module:
    """LAMP scores of channels, one threshold for all (after Lee et al. 2021). Arguments as ``dep_graph_prune``."""
    return _prune("lamp", model, dataloader, pruning_ratio, kwargs)


def udfc_seed_prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, **kwargs) -> nn.Module:
    """UDFC as the source documents describe it: even strides by L1 norm. Arguments as ``dep_graph_prune``."""
    return _prune("udfc_seed", model, dataloader, pruning_ratio, kwargs)


def hobs_uniform_prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, **kwargs) -> nn.Module:
    """H-OBS at uniform widths, with least-squares repair. Arguments as ``dep_graph_prune``."""
    return _prune("hobs_uniform", model, dataloader, pruning_ratio, kwargs)


def hobs_rspar_prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, **kwargs) -> nn.Module:
    """H-OBS with widths from R-SPAR, with least-squares repair. Arguments as ``dep_graph_prune``."""
    return _prune("hobs_rspar", model, dataloader, pruning_ratio, kwargs)
