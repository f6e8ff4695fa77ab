"""Claim C2: output error of the consumers when every group loses the same share of its channels.

``python benchmarks/reconstruction.py`` removes 30 % and 50 % of the channels of every group of the study's dense
network, chosen by each criterion, and measures the mean relative squared output error of all consumers on validation
images, as the prune stage does: without repair, and after the least-squares repair. Writes
``reports/<study>/claims/reconstruction.json``.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from _dense_study import DenseStudy, parts
from _experiment import run
from hobs_rspar import checkpoint
from hobs_rspar.curvature import repair, statistics
from hobs_rspar.curvature.hobs import consumers, kfac_hessian
from hobs_rspar.curvature.joint import JointModel
from hobs_rspar.seeds import generator

SHARES = (0.3, 0.5)
SEEDS = range(3)  # of the random choice
IMAGES = 512  # held-out images of the error
PARTS = 8  # of them, over which the interval is bootstrapped
POSITIONS = 32  # per image and layer, as in the prune stage
RESAMPLES = 10_000
SECOND_ORDER = ("kfac", "joint_gates", "joint_kfac", "joint_output", "hobs")


def orders(study: DenseStudy) -> dict[str, list[Tensor]]:
    """For every criterion and group the channels, the first to go first."""
    gates, factors = statistics.collect(study.network, study.groups, study.calibration, study.params.sensitivity,
                                        generator(0, "benchmark/reconstruction"))
    sizes = study.groups.sizes.tolist()
    found = {name: [torch.argsort(score, stable=True) for score in gates[name].split(sizes)]
             for name in ("l1", "taylor", "fisher", "kfac", "hobs")}
    model = JointModel.of_gates(gates["true_rows"], gates["sampled_rows"])
    edges = np.cumsum([0, *sizes]).tolist()
    found["joint_gates"] = [model.within(slice(a, b)).eliminate()[0] for a, b in zip(edges, edges[1:])]
    for name in ("joint_kfac", "joint_output"):
        found[name] = [joint(study, group, factors, name) for group in study.groups]
    for seed in SEEDS:
        random = generator(seed, "benchmark/reconstruction", "random")
        found[f"random {seed}"] = [torch.randperm(size, generator=random) for size in sizes]
    return found


def joint(study: DenseStudy, group, factors: dict[str, Tensor], name: str) -> Tensor:
    """Order of greedy elimination on the group's Kronecker-factored Hessian, nothing compensated.

    ``joint_kfac`` weights the consumers' outputs by their Fisher; ``joint_output`` by one over the energy of each
    consumer's outputs, which makes it the very error that this experiment measures, as long as no other group is cut.
    """
    parts = consumers(group, study.network, factors)
    if not parts:
        return torch.arange(group.channels)
    if name == "joint_kfac":
        weights = [factors[f"{member.layer}/g"][0] for member in group.with_role("consumer")]
    else:
        flat = [part.weight.flatten(1) for part in parts]
        weights = [torch.eye(len(w), dtype=w.dtype) / ((w @ part.covariance) * w).sum().clamp_min(1e-30)
                   for w, part in zip(flat, parts)]
    hessian = kfac_hessian(parts, weights)
    return JointModel(torch.zeros(group.channels, dtype=hessian.dtype), hessian).eliminate()[0]


def pruned(study: DenseStudy, order: list[Tensor], share: float) -> tuple[nn.Module, list[list[int]]]:
    """The network without ``share`` of the channels of every group, and what is kept."""
    kept = [sorted(channels[0 if group.protected else round(share * group.channels):].tolist())
            for group, channels in zip(study.groups, order)]
    state = study.groups.sliced(study.network.state_dict(), kept)
    network = checkpoint.fit(copy.deepcopy(study.network), state, "reconstruction")
    return network.to(memory_format=torch.channels_last), kept


def errors(study: DenseStudy, network: nn.Module, kept: list[list[int]]) -> np.ndarray:
    """Mean relative squared output error of the consumers on each part of the held-out images [PARTS]."""
    return np.array([repair.reconstruction_error(network, study.network, study.groups, kept, some, POSITIONS,
                                                 generator(0, "benchmark/reconstruction/error"))
                     for some in parts(study.validation.first(IMAGES), IMAGES // PARTS)])


def measured(study: DenseStudy, found: dict[str, list[Tensor]]) -> dict[tuple[str, float], dict[str, np.ndarray]]:
    """Errors of every criterion and share, ``plain`` and ``repaired`` [PARTS]; random: the mean over its seeds."""
    options = study.params.prune
    images = study.calibration.first(options.images)
    table: dict[tuple[str, float], dict[str, list]] = {}
    for share in SHARES:
        for name, order in found.items():
            network, kept = pruned(study, order, share)
            row = table.setdefault((name.split()[0], share), {"plain": [], "repaired": []})
            row["plain"].append(errors(study, network, kept))
            repair.least_squares(network, study.network, study.groups, kept, images, options,
                                 generator(0, "benchmark/reconstruction/repair"))
            row["repaired"].append(errors(study, network, kept))
    return {key: {way: np.mean(values, 0) for way, values in row.items()} for key, row in table.items()}


def reduction(error: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Percent below a reference, with a paired bootstrap interval over the parts of the images."""
    drawn = np.random.default_rng(0).integers(len(error), size=(RESAMPLES, len(error)))
    lo, hi = np.quantile(100 * (1 - error[drawn].mean(1) / reference[drawn].mean(1)), [0.025, 0.975])
    return {"measured": float(100 * (1 - error.mean() / reference.mean())), "lo": float(lo), "hi": float(hi)}


def verdict(found: dict[tuple[str, float], dict[str, np.ndarray]]) -> dict:
    """The claim's numbers; each part of its goal is met when its whole interval is."""
    half = {name: row for (name, share), row in found.items() if share == 0.5}
    best = min(SECOND_ORDER, key=lambda name: half[name]["plain"].mean())
    repaired = min(SECOND_ORDER, key=lambda name: half[name]["repaired"].mean())
    alone = reduction(half[best]["plain"], half["l1"]["plain"])
    with_repair = reduction(half[repaired]["repaired"], half["l1"]["plain"])
    random = {share: found["random", share]["repaired"].mean() for share in SHARES}
    beaten = [f"{name} at {share:.0%}" for name in SECOND_ORDER for share in SHARES
              if found[name, share]["repaired"].mean() > random[share]]
    holds = alone["lo"] >= 45 and with_repair["lo"] >= 97 and not beaten
    how = (f"{best} against L1, 50 % of the channels of every group removed, no repair, the best of "
           f"{len(SECOND_ORDER)} second-order criteria; with least-squares repair {repaired} is "
           f"{with_repair['measured']:.1f} % below plain L1 ({with_repair['lo']:.1f} to {with_repair['hi']:.1f}); "
           f"worse than random with repair: {', '.join(beaten) or 'none'}; mean relative squared output error of all "
           f"consumers, {IMAGES} validation images, paired bootstrap over {PARTS} parts of them")
    return alone | {"unit": "% lower error", "holds": bool(holds), "reason": "", "conditions": how}


NAMES = {"random": f"random (mean of {len(SEEDS)})", "l1": "magnitude (L1)", "taylor": "Taylor",
         "fisher": "exact Fisher", "kfac": "K-FAC", "joint_gates": "joint gates, greedy",
         "joint_kfac": "joint K-FAC, greedy", "joint_output": "joint output error, greedy", "hobs": "H-OBS order"}


def error_table(study: DenseStudy, found: dict[tuple[str, float], dict[str, np.ndarray]]) -> dict:
    rows = []
    for name, title in NAMES.items():
        row: dict = {"criterion": title}
        for share in SHARES:
            for way in ("plain", "repaired"):
                row[f"{way}_{share:g}"] = float(found[name, share][way].mean())
        rows.append(row)
    columns = [("criterion", "Channels chosen by"), *((f"{way}_{share:g}", f"{share:.0%} removed, {words}")
               for share in SHARES for way, words in (("plain", "no repair"), ("repaired", "least squares")))]
    return {"name": "C2", "title": "Output error of the consumers at equal budgets per layer",
            "note": f"Mean relative squared output error, means taken out, on {IMAGES} validation images; repair from "
                    f"{study.params.prune.images} calibration images; {study.subject}.",
            "columns": columns, "rows": rows}


def main() -> None:
    study = DenseStudy.load()
    found = measured(study, orders(study))
    record = verdict(found)
    record["conditions"] += f"; {study.subject}"
    study.publish("C2", record | {"tables": [error_table(study, found)]})


if __name__ == "__main__":
    run(main)
