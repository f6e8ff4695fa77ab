"""Claim C1: what all channel scores cost, against exact rivals on the same images, and how faithful they are (T9).

``python benchmarks/sensitivity.py`` times, on the study's dense network, a sweep against Hessian-vector products and
full K-FAC factors in interleaved rounds of one batch each, in CPU time of one thread. It then closes every channel in
turn and correlates the true loss changes with all scores. Writes ``reports/<study>/claims/C1.json``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from _dense_study import DenseStudy

from hobs_rspar.curvature import statistics
from hobs_rspar.curvature.filters import FilterMoments, kron_obd
from hobs_rspar.curvature.gates import GateGradients, Gates, fisher_score, relabelled, signed_score
from hobs_rspar.curvature.kfac import KFACHessianApproximator
from hobs_rspar.curvature.oracle import loss_changes
from hobs_rspar.curvature.passes import sweep
from hobs_rspar.data import Images
from hobs_rspar.evidence.statistics import Interval
from hobs_rspar.seeds import generator

IMAGES = 1024
PROBES = 300  # of Hutchinson's estimator, as HAP takes them
SHARE = 2  # Hessian-vector products timed a round; the others are extrapolated
FIDELITY = 512  # images on which every channel is closed
RESAMPLES = 10_000
PAPER_FILTERS = 26_560  # channels of ResNet-50, which the goal against one product per filter was derived for
GOALS = {"one": 0.75, "both": 1.05, "hutchinson": 1500, "kfac": 3.5, "filters": 1e5}


class Contenders:
    """Everything that is timed, as methods that take one batch of images.

    Args:
        study: the dense network and its groups.
    """

    def __init__(self, study: DenseStudy):
        self.network, self.groups, self.gates = study.network, study.groups, Gates(study.groups)
        self.weights = [m.weight for m in self.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self.random = generator(0, "benchmark/sensitivity")
        self.layer_gradients: list[Tensor] = []

    def training_step(self, images: Images) -> None:
        """Forward and backward with weight gradients, batch norms in evaluation mode: the unit of cost."""
        self._loss(images).backward()
        self.network.zero_grad()

    def one(self, images: Images) -> None:
        """One forward, one backward with sampled labels: exact gate Fisher and Kronecker OBD of all channels."""
        self._sweep(images)

    def both(self, images: Images) -> None:
        """Both kinds of labels: signed first order and empirical Fisher, too."""
        rows, labels = self._sweep(images)
        relabelled(self.network, self.gates, images, len(images), rows, labels)

    def kfac(self, images: Images) -> None:
        """Full Kronecker factors of all layers, all positions; without weight gradients, which favours it."""
        factors = KFACHessianApproximator(self.network, update_freq=1)
        sweep(self.network, images, len(images), [factors], self.random)

    def gradient_graph(self, images: Images) -> None:
        """The differentiable gradient that all Hessian-vector products of a batch share."""
        self.layer_gradients = torch.autograd.grad(self._loss(images), self.weights, create_graph=True)

    def probe(self, _images: Images) -> None:
        """One probe of Hutchinson's estimator: the product with a random sign for every weight."""
        signs = [2.0 * torch.randint(2, w.shape, generator=self.random) - 1 for w in self.weights]
        torch.autograd.grad(self.layer_gradients, self.weights, signs, retain_graph=True)

    def filter_product(self, number: int) -> None:
        """w^T H w of one filter, by the product within its own layer; ``number`` counts all filters."""
        for weight, gradient in zip(self.weights, self.layer_gradients):
            if number < len(weight):
                alone = torch.zeros_like(weight)
                alone[number] = weight.detach()[number]
                torch.autograd.grad(gradient, weight, alone, retain_graph=True)
                return
            number -= len(weight)

    def _loss(self, images: Images) -> Tensor:
        (x, labels), = images.batches(len(images))
        return F.cross_entropy(self.network(x), labels, reduction="sum")

    def _sweep(self, images: Images) -> tuple[Tensor, Tensor]:
        rows = GateGradients(self.network, self.gates, len(images))
        moments = FilterMoments(self.network, self.groups)
        labels = sweep(self.network, images, len(images), [rows, moments], self.random)
        fisher_score(rows.rows), kron_obd(self.groups, moments)
        return rows.rows, labels


def cpu_seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def timed(contenders: Contenders, batches: list[Images]) -> dict[str, np.ndarray]:
    """CPU seconds of every contender in every round, one batch a round, the order reversed every other round."""
    filters = sum(len(weight) for weight in contenders.weights)
    chosen = np.linspace(0, filters - 1, SHARE * len(batches)).astype(int)  # filters whose products are timed
    times: dict[str, list[float]] = {}
    for number, batch in enumerate([batches[0], *batches]):  # the first round warms up
        mine = chosen[SHARE * (number - 1):SHARE * number] if number else chosen[:SHARE]
        calls = {name: lambda name=name, batch=batch: getattr(contenders, name)(batch)
                 for name in ("training_step", "one", "both", "kfac", "gradient_graph")}
        calls |= {"probe": lambda batch=batch: [contenders.probe(batch) for _ in range(SHARE)],
                  "filter_product": lambda mine=mine: [contenders.filter_product(int(i)) for i in mine]}
        for name in ordered(calls, number):
            times.setdefault(name, []).append(cpu_seconds(calls[name]))
        contenders.layer_gradients = []
    seconds = {name: np.array(values[1:]) for name, values in times.items()}
    graph = seconds["gradient_graph"]
    return {"training_step": seconds["training_step"], "one": seconds["one"], "both": seconds["both"],
            "kfac": seconds["kfac"], "hutchinson": graph + PROBES / SHARE * seconds["probe"],
            "filters": graph + filters / SHARE * seconds["filter_product"]}


def ordered(calls: dict, number: int) -> list[str]:
    """First-order contenders in alternating order; products need the graph that is built before them."""
    first = list(calls)[:4]
    return [*(first if number % 2 else first[::-1]), "gradient_graph", "probe", "filter_product"]


def ratio(over: np.ndarray, under: np.ndarray) -> Interval:
    """Ratio of two sums over rounds, with its paired bootstrap interval."""
    rounds = np.random.default_rng(0).integers(len(over), size=(RESAMPLES, len(over)))
    lo, hi = np.quantile(over[rounds].sum(1) / under[rounds].sum(1), [0.025, 0.975])
    return Interval(float(over.sum() / under.sum()), float(lo), float(hi))


def cost_table(seconds: dict[str, np.ndarray], filters: int) -> dict:
    """Seconds for all images, and ratios to a training step and to one sweep."""
    rounds = len(seconds["one"])
    products = f"extrapolated from {SHARE * rounds} products"
    named = {"training_step": ("forward and backward with weight gradients", "timed in full"),
             "one": ("one sweep, sampled labels: exact gate Fisher, Kronecker OBD", "timed in full"),
             "both": ("one sweep, both kinds of labels: signed first order and empirical Fisher, too", "timed in full"),
             "kfac": ("full K-FAC factors, all layers and positions", "timed in full"),
             "hutchinson": (f"Hutchinson, {PROBES} probes, one graph per batch",
                            f"extrapolated from {SHARE} probes on every batch"),
             "filters": (f"one Hessian-vector product per filter ({filters})", products)}
    rows = []
    for name, (what, how) in named.items():
        step, own = ratio(seconds[name], seconds["training_step"]), ratio(seconds[name], seconds["one"])
        rows.append({"what": what, "seconds": float(seconds[name].sum()), "steps": step.value, "steps_lo": step.lo,
                     "steps_hi": step.hi, "sweeps": own.value, "sweeps_lo": own.lo, "sweeps_hi": own.hi, "how": how})
    columns = [("what", "What"), ("seconds", "CPU seconds"), ("steps", "Training steps"), ("steps_lo", "from"),
               ("steps_hi", "to"), ("sweeps", "Sweeps"), ("sweeps_lo", "from"), ("sweeps_hi", "to"), ("how", "How")]
    return {"name": "C1", "title": f"Cost of all channel scores, {IMAGES:,} images",
            "note": f"CPU time of one thread; {rounds} interleaved rounds; 95 % bootstrap intervals over rounds.",
            "columns": columns, "rows": rows}


def fidelity_table(study: DenseStudy) -> dict:
    """T9: Spearman correlation of every score with the true loss change, on the same and on held-out images."""
    same, other = study.calibration.first(FIDELITY), study.validation.first(FIDELITY)
    found, _ = statistics.collect(study.network, study.groups, same, study.params.sensitivity,
                                  generator(0, "benchmark/fidelity"))
    truth, transfer = (loss_changes(study.network, study.groups, images, 128) for images in (same, other))
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
            "note": f"Spearman correlation over {sum(sizes)} channels, pooled and as the mean within groups; scores and "
                    f"true changes on the same {FIDELITY} calibration images, and true changes on {FIDELITY} "
                    f"validation images. H-OBS scores channels whose removal is compensated. {study.subject}.",
            "columns": columns, "rows": table}


def pooled(score: Tensor, truth: Tensor) -> float:
    return float(spearmanr(score, truth).statistic)


def within(score: Tensor, truth: Tensor, sizes: list[int]) -> float:
    """Mean correlation within groups."""
    return float(np.mean([pooled(a, b) for a, b in zip(score.split(sizes), truth.split(sizes))]))


def main() -> None:
    study = DenseStudy.load()
    contenders, size = Contenders(study), study.params.sensitivity.batch_size
    images = study.calibration.first(IMAGES)
    seconds = timed(contenders, [part for part in images.split(size)])
    filters = sum(len(weight) for weight in contenders.weights)
    print({name: round(float(values.sum()), 2) for name, values in seconds.items()})
    table = fidelity_table(study)
    for row in table["rows"]: print(row)
    study.write("C1", {"tables": [cost_table(seconds, filters), table]})


if __name__ == "__main__":
    main()
