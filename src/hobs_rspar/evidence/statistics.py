"""The statistics of a study: intervals, paired differences, corrections, and what a design cannot show.

The unit is the cell. Two methods are compared on the seeds that both have, pair by pair. All random resampling uses
numpy generators of its own. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from hobs_rspar.errors import UserError, did_you_mean

BOOTSTRAP_FROM = 10  # pairs; below, a percentile bootstrap is too narrow and the t interval is reported
RESAMPLES = 10_000
# Differences of equal numbers come out as rounding noise of about 1e-14; below this they count as having no spread.
NO_SPREAD = 1e-9


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; ``lo`` and ``hi`` are None where one value gives no interval."""

    value: float
    lo: float | None
    hi: float | None


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, ``method - baseline``, in the unit of the inputs.

    Attributes:
        interval: mean and interval; ``kind`` says which interval it is.
        bootstrap: the paired percentile bootstrap beside it.
        effect_size: Cohen's d_z, the mean difference over the standard deviation of the differences.
        n: number of pairs.
    """

    interval: Interval
    kind: str
    bootstrap: Interval
    t_statistic: float
    p_value: float
    effect_size: float
    n: int


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean with its t interval; UserError for fewer than two values or one that is not finite."""
    sample = _sample(values, "values")
    mean, half = float(sample.mean()), _half_width(sample, confidence)
    return Interval(mean, mean - half, mean + half)


def median_interval(values: Sequence[float], confidence: float = 0.95, resamples: int = RESAMPLES,
                    seed: int = 0) -> Interval:
    """Median with its percentile bootstrap interval; used for timings, whose outliers are on one side."""
    sample = _sample(values, "values")
    medians = np.median(_resampled(sample, resamples, seed), axis=1)
    return Interval(float(np.median(sample)), *_percentiles(medians, confidence))


def bootstrap_confidence_interval(data: Sequence[float], confidence: float = 0.95,
                                  n_bootstrap: int = RESAMPLES) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        data: at least two numbers, such as the accuracies of one method over its seeds.
        confidence: between 0 and 1.
        n_bootstrap: resamples.

    Returns:
        Lower and upper bound; the same for the same data (the generator's seed is fixed).

    Raises:
        UserError: fewer than two values, or one that is not finite; confidence outside (0, 1).
    """
    if n_bootstrap < 1:
        raise UserError(f"n_bootstrap is {n_bootstrap}; at least 1 resample is needed, 10000 is usual")
    _fraction(confidence, "confidence")
    return _percentiles(_resampled(_sample(data, "data"), n_bootstrap, 0).mean(axis=1), confidence)


def paired_difference(method: Sequence[float], baseline: Sequence[float], confidence: float = 0.95,
                      resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Mean of ``method - baseline`` over pairs, with a t interval below n = 10 and a paired bootstrap from there on.

    Raises:
        UserError: unequal lengths, fewer than two pairs, or a value that is not a finite number.
    """
    differences = _differences(method, baseline)
    mean, half = float(differences.mean()), _half_width(differences, confidence)
    means = _resampled(differences, resamples, seed).mean(axis=1)
    bootstrap = Interval(mean, *_percentiles(means, confidence))
    few = len(differences) < BOOTSTRAP_FROM
    statistic, p_value, effect = _t_test(differences)
    return Difference(Interval(mean, mean - half, mean + half) if few else bootstrap,
                      "paired t" if few else "paired bootstrap", bootstrap, statistic, p_value, effect,
                      len(differences))


def paired_t_test(baseline: Sequence[float], method: Sequence[float], alpha: float = 0.05) -> dict:
    """Two-sided paired t-test of ``method - baseline``.

    Args:
        baseline: one number per seed.
        method: the same seeds in the same order.
        alpha: level of the test; the interval's confidence is ``1 - alpha``.

    Returns:
        ``t_statistic`` and ``mean_difference`` (above 0 where ``method`` is larger), ``p_value``, ``significant``,
        ``confidence_interval`` (lower, upper), ``effect_size`` (Cohen's d_z), ``n``.

    Raises:
        UserError: unequal lengths, fewer than two pairs, a value that is not a finite number, alpha outside (0, 1).
    """
    _fraction(alpha, "alpha")
    differences = _differences(method, baseline)
    mean, half = float(differences.mean()), _half_width(differences, 1 - alpha)
    statistic, p_value, effect = _t_test(differences)
    return {"t_statistic": statistic, "p_value": p_value, "significant": p_value < alpha, "mean_difference": mean,
            "confidence_interval": (mean - half, mean + half), "effect_size": effect, "n": len(differences)}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted by Holm's step-down procedure (Scandinavian Journal of Statistics, 1979), same keys."""
    adjusted, running = {}, 0.0
    for step, name in enumerate(sorted(p_values, key=p_values.get)):
        running = max(running, min(1.0, (len(p_values) - step) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def non_inferiority(method: Sequence[float], reference: Sequence[float], margin: float, alpha: float = 0.025) -> dict:
    """One-sided test that ``method`` is at most ``margin`` below ``reference``, paired.

    Returns:
        ``mean_difference``, ``lower_bound`` (one-sided, level ``1 - alpha``), ``p_value`` of the hypothesis that the
        loss is ``margin`` or more, ``holds`` (lower bound above ``-margin``), ``n``.

    Raises:
        UserError: as ``paired_t_test``; a margin that is not above 0.
    """
    if not margin > 0:
        raise UserError(f"margin is {margin}; non-inferiority needs a margin above 0, fixed before the run")
    differences = _differences(method, reference)
    mean, half = float(differences.mean()), _half_width(differences, 1 - 2 * alpha)
    statistic, _, _ = _t_test(differences + margin)
    return {"mean_difference": mean, "lower_bound": mean - half, "n": len(differences), "holds": mean - half > -margin,
            "p_value": float(stats.t.sf(statistic, len(differences) - 1))}


def crossed_bootstrap(correct: np.ndarray, correct_reference: np.ndarray, confidence: float = 0.95,
                      resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Accuracy difference in points, resampling seeds and test images together.

    Images with equal differences over the seeds are interchangeable: one multinomial draw over these patterns
    replaces a draw of every image.

    Args:
        correct: per-image correctness of the method, [seeds, images], booleans.
        correct_reference: the same for the reference, the same seeds and images.
        confidence: of the interval.
        resamples: how many.
        seed: of the resampling.

    Returns:
        Mean difference and the percentile interval, in points (percent).
    """
    difference = correct.astype(np.int8) - correct_reference.astype(np.int8)
    seeds, images = difference.shape
    patterns, counts = np.unique(difference, axis=1, return_counts=True)
    generator = np.random.default_rng(seed)
    image_weights = generator.multinomial(images, counts / images, size=resamples) / images
    seed_weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    means = 100 * np.einsum("bs,sp,bp->b", seed_weights, patterns, image_weights, optimize=True)
    return Interval(100 * float(difference.mean()), *_percentiles(means, confidence))


def smallest_wilcoxon_p(n: int) -> float:
    """The smallest two-sided p that an exact Wilcoxon signed-rank test of ``n`` pairs can reach: ``2 / 2^n``."""
    return min(1.0, 2.0 / 2**n)


def seeds_needed(alpha: float = 0.05, comparisons: int = 1) -> int:
    """Fewest pairs with which an exact Wilcoxon test can clear the first Holm step against ``comparisons`` rivals."""
    return max(2, math.ceil(math.log2(2 * comparisons / alpha)))


def exact_wilcoxon(method: Sequence[float], baseline: Sequence[float], alpha: float = 0.05,
                   comparisons: int = 1) -> float:
    """Exact two-sided Wilcoxon signed-rank p-value, where the design can reach the corrected level.

    Raises:
        UserError: with this many pairs no data at all could be significant; the message says how many would do.
    """
    differences = _differences(method, baseline)
    needed = seeds_needed(alpha, comparisons)
    if len(differences) < needed:
        raise UserError(f"no Wilcoxon p-value is given: with n = {len(differences)} pairs it cannot go below "
                        f"{smallest_wilcoxon_p(len(differences)):.4g}, but {alpha / comparisons:.4g} is needed "
                        f"({comparisons} comparison{'s' * (comparisons > 1)}); {needed} seeds would do")
    return float(stats.wilcoxon(differences, method="exact").pvalue)


def run_statistical_analysis(results: Mapping[str, Sequence[float]], baseline_name: str = "Unpruned") -> dict:
    """Compares every method with one baseline, seed by seed.

    Args:
        results: method name to one number per seed, the same seeds in the same order for all.
        baseline_name: key of ``results``; upper and lower case count as equal.

    Returns:
        ``baseline``: its key. ``methods``: name to ``n, mean, std, confidence_interval`` (t, 95 %). ``comparisons``:
        name to the dictionary of ``paired_t_test`` plus ``bootstrap_interval``, ``p_adjusted`` (Holm over all
        comparisons; ``significant`` refers to it), ``wilcoxon_p`` (None where n cannot reach the corrected level) and
        ``wilcoxon_note`` (how many seeds would do, or an empty string).

    Raises:
        UserError: the baseline is unknown; unequal lengths; fewer than two seeds; a value that is not finite.
    """
    baseline = next((name for name in results if name.lower() == baseline_name.lower()), None)
    if baseline is None:
        raise UserError(f"baseline_name '{baseline_name}' is not in results.{did_you_mean(baseline_name, results)} "
                        f"Allowed: {', '.join(results) or 'nothing, results is empty'}")
    rivals = {name: values for name, values in results.items() if name != baseline}
    tests = {name: paired_t_test(results[baseline], values) for name, values in rivals.items()}
    adjusted = holm({name: test["p_value"] for name, test in tests.items()})
    for name, test in tests.items():
        bootstrap = paired_difference(rivals[name], results[baseline]).bootstrap
        test.update(bootstrap_interval=(bootstrap.lo, bootstrap.hi), p_adjusted=adjusted[name],
                    significant=adjusted[name] < 0.05, **_wilcoxon(rivals[name], results[baseline], len(rivals)))
    return {"baseline": baseline, "methods": {name: _described(values) for name, values in results.items()},
            "comparisons": tests}


def _wilcoxon(method: Sequence[float], baseline: Sequence[float], comparisons: int) -> dict:
    try:
        return {"wilcoxon_p": exact_wilcoxon(method, baseline, comparisons=comparisons), "wilcoxon_note": ""}
    except UserError as refusal:
        return {"wilcoxon_p": None, "wilcoxon_note": str(refusal)}


def _described(values: Sequence[float]) -> dict:
    interval = mean_interval(values)
    return {"n": len(values), "mean": interval.value, "std": float(np.std(values, ddof=1)),
            "confidence_interval": (interval.lo, interval.hi)}


def _sample(values: Sequence[float], name: str) -> np.ndarray:
    try:
        sample = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be numbers; seen: {values!r}") from None
    if sample.ndim != 1 or len(sample) < 2:
        raise UserError(f"{name} has shape {list(sample.shape)}; at least 2 numbers in a row are needed (one per "
                        "seed): one run has no spread, so add a seed to study.seeds")
    if not np.isfinite(sample).all():
        where = [int(index) for index in np.flatnonzero(~np.isfinite(sample))]
        raise UserError(f"{name} holds NaN or infinity at position {where}; leave out the failed seed on both sides")
    return sample


def _differences(method: Sequence[float], baseline: Sequence[float]) -> np.ndarray:
    first, second = _sample(method, "method"), _sample(baseline, "baseline")
    if len(first) != len(second):
        raise UserError(f"method has {len(first)} values and baseline {len(second)}; pairs need the same seeds in the "
                        "same order on both sides")
    return first - second


def _half_width(sample: np.ndarray, confidence: float) -> float:
    quantile = stats.t.ppf(0.5 + confidence / 2, len(sample) - 1)
    return float(quantile * sample.std(ddof=1) / math.sqrt(len(sample)))


def _t_test(differences: np.ndarray) -> tuple[float, float, float]:
    """t, two-sided p and Cohen's d_z; equal differences give the limit (p 1 at zero, p 0 elsewhere)."""
    mean, spread = float(differences.mean()), float(differences.std(ddof=1))
    if spread <= NO_SPREAD * max(1.0, abs(mean)):
        zero = abs(mean) <= NO_SPREAD
        return (0.0, 1.0, 0.0) if zero else (math.copysign(math.inf, mean), 0.0, math.copysign(math.inf, mean))
    statistic = mean / spread * math.sqrt(len(differences))
    return statistic, float(2 * stats.t.sf(abs(statistic), len(differences) - 1)), mean / spread


def _resampled(sample: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    return sample[np.random.default_rng(seed).integers(0, len(sample), size=(resamples, len(sample)))]


def _percentiles(estimates: np.ndarray, confidence: float) -> tuple[float, float]:
    lo, hi = np.quantile(estimates, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(lo), float(hi)


def _fraction(value: float, name: str) -> None:
    if not 0 < value < 1:
        raise UserError(f"{name} is {value}; it must lie between 0 and 1")
