"""H-OBS and R-SPAR: structured pruning of CNNs, measured. Public names load on first use (PEP 562)."""

from __future__ import annotations

import importlib

_PUBLIC = {
    "compress": "compression",
    "groups": "surgery",
    "PruningPlan": "plan",
    "UserError": "errors",
    "HOBSSensitivityAnalyzer": "curvature.analyzer",
    "KFACHessianApproximator": "curvature.kfac",
    "RSPARAgent": "allocation.ppo",
    "PhysicalPruner": "surgery",
    "SystemMetrics": "hardware.metrics",
    "GPUProfiler": "hardware.profiler",
    "paired_t_test": "evidence.statistics",
    "bootstrap_confidence_interval": "evidence.statistics",
    "run_statistical_analysis": "evidence.statistics",
    "plot_training_curves": "evidence.plots",
    "plot_pruning_comparison": "evidence.plots",
    "plot_sensitivity_heatmap": "evidence.plots",
    "plot_lambda_evolution": "evidence.plots",
    "unpruned": "baselines",
    "adaprune_prune": "adaprune",
    "dep_graph_prune": "baselines",
    "taylor_prune": "baselines",
    "random_prune": "baselines",
    "random_repair_prune": "baselines",
    "l1_prune": "baselines",
    "l1_repair_prune": "baselines",
    "l2_global_prune": "baselines",
    "fpgm_prune": "baselines",
    "lamp_prune": "baselines",
    "udfc_prune": "baselines",
    "udfc_seed_prune": "baselines",
    "depgraph_prune": "baselines",
    "jtp_prune": "baselines",
    "jtp_seed_prune": "baselines",
    "bilevel_prune": "baselines",
    "bilevel_seed_prune": "baselines",
    "structalign_prune": "baselines",
    "structalign_seed_prune": "baselines",
    "scratch_prune": "baselines",
    "taylor_iterative_prune": "baselines",
    "hrank_prune": "baselines",
    "decore_prune": "baselines",
    "autocompress_prune": "baselines",
    "amc_prune": "baselines",
    "gnn_prune": "baselines",
    "hobs_uniform_prune": "baselines",
    "hobs_rspar_prune": "baselines",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hobs_rspar' has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_PUBLIC[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
