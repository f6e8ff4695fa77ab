"""Claim C1: what all channel scores cost, against exact rivals on the same images, and how faithful they are (T9).

``python benchmarks/sensitivity.py`` times, on the study's dense network, a sweep against Hessian-vector products and
full K-FAC factors in interleaved rounds of one batch each, in CPU time of one thread. It then closes every channel in
turn and correlates the true loss changes with all scores. Writes ``reports/<study>/claims/sensitivity.json``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from _dense_study import DenseStudy, parts
from _experiment import run
from hobs_rspar.curvature import statistics
from hobs_rspar.curvature.filters import FilterMoments, kron_obd
from hobs_rspar.curvature.gates import (
    GateGradients,
    Gates,
    fisher_score,
    gate_gradients,
    relabelled,
    signed_score,
    taylor_score,
)
from hobs_rspar.curvature.kfac import KFACHessianApproximator
from hobs_rspar.curvature.oracle import loss_changes
from hobs_rspar.curvature.passes import sweep
from hobs_rspar.data import Images
from hobs_rspar.evidence.statistics import Interval
from hobs_rspar.seeds import generator

IMAGES = 1024
BATCH = 128
ROUNDS = 4
PROBES = 300  # of Hutchinson's estimator, as HAP takes them
SHARED = 2  # products a round that share one graph, of either kind; the others are extrapolated
FIDELITY = 384  # images on which every channel is closed
RESAMPLES = 10_000
PUBLISHED_CHANNELS = 26_560  # of ResNet-50, which the goal of 10^5 against one product per filter is about


class Contenders:
    """Everything that is timed.

    Args:
        study: the dense network and its groups.
    """

    def __init__(self, study: DenseStudy):
        self.network, self.groups, self.gates = study.network, study.groups, Gates(study.groups)
        self.weights = [m.weight for m in self.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self.filters = [(weight, number) for weight in self.weights for number in range(len(weight))]
        self.random = generator(0, "benchmark/sensitivity")
        self.gradient: dict[Tensor, Tensor] = {}

    def step(self, images: Images) -> None:
        """Forward and backward with weight gradients, batch norms in evaluation mode: the unit of cost."""
        for x, labels in images.batches(BATCH):
            self._loss(x, labels).backward()
            self.network.zero_grad()

    def one(self, images: Images) -> None:
        """Gate gradients of one kind of labels: the exact Fisher of all channels."""
        fisher_score(gate_gradients(self.network, self.gates, images, BATCH, self.random))

    def all(self, images: Images) -> None:
        """Both kinds of labels and the filters' moments: signed, Taylor and Kronecker OBD scores, too."""
        rows, moments = GateGradients(self.network, self.gates, len(images)), FilterMoments(self.network, self.groups)
        labels = sweep(self.network, images, BATCH, [rows, moments], self.random)
        true = relabelled(self.network, self.gates, images, BATCH, rows.rows, labels)
        signed_score(true, rows.rows), taylor_score(true, 64), kron_obd(self.groups, moments)

    def kfac(self, images: Images) -> None:
        """Full Kronecker factors of all layers, all positions; without weight gradients, which favours it."""
        factors = KFACHessianApproximator(self.network, update_freq=1)
        sweep(self.network, images, BATCH, [factors], self.random)

    def graph(self, images: Images) -> None:
        """The differentiable gradient of one batch, which its Hessian-vector products may share."""
        (batch,) = images.batches(len(images))
        gradient = torch.autograd.grad(self._loss(*batch), self.weights, create_graph=True)
        self.gradient = dict(zip(self.weights, gradient))

    def probe(self) -> None:
        """One probe of Hutchinson's estimator on the batch of the graph: a random sign for every weight."""
        signs = [2.0 * torch.randint(2, w.shape, generator=self.random) - 1 for w in self.weights]
        torch.autograd.grad(list(self.gradient.values()), self.weights, signs, retain_graph=True)

    def within_layer(self, weight: Tensor, number: int) -> None:
        """w^T H w of one filter from its own layer's block of H alone, on the batch of the graph."""
        alone = torch.zeros_like(weight)
        alone[number] = weight.detach()[number]
        torch.autograd.grad(self.gradient[weight], weight, alone, retain_graph=True)

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.network(x), labels, reduction="sum")


def timed(contenders: Contenders, images: Images) -> dict[str, np.ndarray]:
    """CPU seconds for ``IMAGES`` images of every way, as found in each of the rounds [ROUNDS].

    A round times first-order ways on a quarter of the images and products on one batch, in alternating order.
    """
    large, small = parts(images, 2 * BATCH), parts(images, BATCH)
    order = torch.randperm(len(contenders.filters), generator=contenders.random)
    found: dict[str, list[float]] = {}
    for number in range(-1, ROUNDS):  # the first round warms up
        some, batch = large[number % len(large)], small[number % len(small)]
        calls = {name: (partial(getattr(contenders, name), some), len(some)) for name in ("step", "one", "all")}
        calls["kfac"] = partial(contenders.kfac, batch), BATCH
        seconds = {name: cpu_seconds(call) * IMAGES / count for name, (call, count)
                   in list(calls.items())[::1 if number % 2 else -1]}
        seconds |= products(contenders, batch, order[SHARED * number:SHARED * number + SHARED].tolist() or [0])
        for name, value in seconds.items() if number >= 0 else ():
            found.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in found.items()}


def products(contenders: Contenders, batch: Images, chosen: list[int]) -> dict[str, float]:
    """Seconds of what needs Hessian-vector products, extrapolated from a few on one batch."""
    graph = cpu_seconds(partial(contenders.graph, batch))
    probe = np.mean([cpu_seconds(contenders.probe) for _ in range(SHARED)])
    within = np.mean([cpu_seconds(partial(contenders.within_layer, *contenders.filters[i])) for i in chosen])
    contenders.gradient = {}
    count, scale = len(contenders.filters), IMAGES / len(batch)
    return {"product": scale * (graph + probe), "hutchinson": scale * PROBES * (graph + probe),
            "hutchinson_shared": scale * (graph + PROBES * probe), "filters": scale * count * (graph + probe),
            "filters_shared": scale * (graph + count * within)}


def cpu_seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def ratio(over: np.ndarray, under: np.ndarray) -> Interval:
    """Ratio of two means over rounds, with its paired bootstrap interval."""
    rounds = np.random.default_rng(0).integers(len(over), size=(RESAMPLES, len(over)))
    lo, hi = np.quantile(over[rounds].sum(1) / under[rounds].sum(1), [0.025, 0.975])
    return Interval(float(over.sum() / under.sum()), float(lo), float(hi))


def verdict(seconds: dict[str, np.ndarray], filters: int) -> dict:
    """The claim's numbers: each part of its goal is met when its whole interval is."""
    against = {name: ratio(seconds[name], seconds["one"]) for name in seconds}
    steps = {name: ratio(seconds[name], seconds["step"]) for name in ("one", "all")}
    scaled = 1e5 * filters / PUBLISHED_CHANNELS
    goals = {"one kind of labels <= 0.75 steps": steps["one"].hi <= 0.75,
             "both kinds <= 1.05 steps": steps["all"].hi <= 1.05,
             ">= 1500x against Hutchinson": against["hutchinson"].lo >= 1500,
             ">= 3.5x against K-FAC factors": against["kfac"].lo >= 3.5,
             f">= {scaled:.0f}x against one product per filter": against["filters"].lo >= scaled}
    missed = [goal for goal, met in goals.items() if not met]
    shared = against["hutchinson_shared"]
    how = (f"gate Fisher of all channels from one sweep, {steps['one'].value:.2f} of forward and backward (both kinds "
           f"of labels and K-FAC's filter moments: {steps['all'].value:.2f}), against {PROBES} Hessian-vector "
           f"products, each with its own gradient (all from one graph per batch: {shared.value:.0f}x, "
           f"{shared.lo:.0f} to {shared.hi:.0f}); {against['kfac'].value:.1f}x against full K-FAC factors, "
           f"{against['filters'].value:.0f}x against one product for each of {filters} filters, where 10^5 for "
           f"ResNet-50's {PUBLISHED_CHANNELS:,} channels is {scaled:.0f}; "
           + (f"missed: {', '.join(missed)}; " if missed else "") + f"{IMAGES:,} images")
    main = against["hutchinson"]
    return {"measured": main.value, "lo": main.lo, "hi": main.hi, "unit": "x faster", "holds": not missed,
            "reason": "", "conditions": how}


def cost_table(seconds: dict[str, np.ndarray], filters: int) -> dict:
    """Seconds for all images, and ratios to a training step and to one sweep."""
    products = f"extrapolated from {SHARED * ROUNDS} products on a batch each"
    named = {"step": ("forward and backward with weight gradients", "timed"),
             "one": ("one sweep, one kind of labels: exact gate Fisher", "timed"),
             "all": ("both kinds of labels and filter moments: all scores but H-OBS", "timed"),
             "kfac": ("full K-FAC factors, all layers and positions", "timed"),
             "product": ("one Hessian-vector product", products),
             "hutchinson": (f"Hutchinson, {PROBES} products (as HAP)", products),
             "hutchinson_shared": (f"Hutchinson, {PROBES} products from one graph per batch", products),
             "filters": (f"one product per filter ({filters})", products),
             "filters_shared": (f"one product per filter within its layer, from one graph per batch ({filters})",
                                products)}
    rows = []
    for name, (what, how) in named.items():
        steps, sweeps = ratio(seconds[name], seconds["step"]), ratio(seconds[name], seconds["one"])
        rows.append({"what": what, "seconds": float(seconds[name].mean()), "steps": steps.value, "steps_lo": steps.lo,
                     "steps_hi": steps.hi, "sweeps": sweeps.value, "sweeps_lo": sweeps.lo, "sweeps_hi": sweeps.hi,
                     "how": how})
    columns = [("what", "What"), ("seconds", "CPU seconds"), ("steps", "Training steps"), ("steps_lo", "from"),
               ("steps_hi", "to"), ("sweeps", "Sweeps"), ("sweeps_lo", "from"), ("sweeps_hi", "to"), ("how", "How")]
    return {"name": "C1", "title": f"Cost of all channel scores, {IMAGES:,} images",
            "note": f"CPU time of one thread, {ROUNDS} interleaved rounds, 95 % paired bootstrap intervals over them. "
                    "A training step is forward and backward with weight gradients, batch norms in evaluation mode.",
            "columns": columns, "rows": rows}


def fidelity_table(study: DenseStudy) -> dict:
    """T9: Spearman correlation of every score with the true loss change, on the same and on held-out images."""
    same, other = study.calibration.first(FIDELITY), study.validation.first(FIDELITY)
    found, _ = statistics.collect(study.network, study.groups, same, study.params.sensitivity,
                                  generator(0, "benchmark/fidelity"))
    truth, transfer = (loss_changes(study.network, study.groups, images, 64) for images in (same, other))
    rows = found["true_rows"]
    scores = {"magnitude (L1)": found["l1"], "Taylor": found["taylor"], "K-FAC diagonal (OBD)": found["obd"],
              "Kronecker OBD": found["kron_obd"], "Kronecker OBS": found["kron_obs"],
              "K-FAC of the consumers": found["kfac"], "exact Fisher": found["fisher"],
              "empirical Fisher": fisher_score(rows), "first order + Fisher": found["signed"],
              "first order + empirical Fisher": signed_score(rows, rows), "H-OBS": found["hobs"],
              "true change, calibration images": truth}
    sizes = study.groups.sizes.tolist()
    table = [{"criterion": name, "same": pooled(score, truth), "same_within": within(score, truth, sizes),
              "held_out": pooled(score, transfer), "held_out_within": within(score, transfer, sizes)}
             for name, score in scores.items()]
    columns = [("criterion", "Criterion"), ("same", "Same images"), ("same_within", "within groups"),
               ("held_out", "Held-out images"), ("held_out_within", "within groups")]
    return {"name": "T9", "title": "Criteria against the true loss change of closing each channel",
            "note": f"Spearman correlation over {sum(sizes)} channels, pooled and as the mean within groups; scores "
                    f"and true changes on the same {FIDELITY} calibration images, and true changes on {FIDELITY} "
                    f"validation images. H-OBS scores channels whose removal is compensated. {study.subject}.",
            "columns": columns, "rows": table}


def pooled(score: Tensor, truth: Tensor) -> float:
    return float(spearmanr(score, truth).statistic)


def within(score: Tensor, truth: Tensor, sizes: list[int]) -> float:
    """Mean correlation within groups."""
    return float(np.mean([pooled(a, b) for a, b in zip(score.split(sizes), truth.split(sizes))]))


def main() -> None:
    study = DenseStudy.load()
    contenders = Contenders(study)
    seconds, filters = timed(contenders, study.calibration.first(IMAGES)), len(contenders.filters)
    record = verdict(seconds, filters)
    record["conditions"] += f", batches of {BATCH}; {study.subject}"
    study.publish("C1", record | {"tables": [cost_table(seconds, filters), fidelity_table(study)]})


if __name__ == "__main__":
    run(main)
