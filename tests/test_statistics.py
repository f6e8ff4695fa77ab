"""The statistics against scipy, against hand-computed and published examples, and their refusals."""

import math

import numpy as np
import pytest
from scipy import stats

from hobs_rspar.errors import UserError
from hobs_rspar.evidence.statistics import (
    bootstrap_confidence_interval,
    crossed_bootstrap,
    exact_wilcoxon,
    holm,
    mean_interval,
    median_interval,
    non_inferiority,
    paired_difference,
    paired_t_test,
    run_statistical_analysis,
    seeds_needed,
    smallest_wilcoxon_p,
)

# Student's sleep data ("Cushny and Peebles", Biometrika 1908): t = 4.0621, p = 0.002833, mean 1.58 hours.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_paired_t_test_gives_the_published_sleep_result():
    found = paired_t_test(DRUG_1, DRUG_2)
    assert found["t_statistic"] == pytest.approx(4.0621, abs=5e-5)
    assert found["p_value"] == pytest.approx(0.002833, abs=5e-7)
    assert found["mean_difference"] == pytest.approx(1.58)
    assert found["confidence_interval"] == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert found["significant"] is True and found["n"] == 10
    assert found["effect_size"] == pytest.approx(4.0621 / math.sqrt(10), abs=1e-4)


def test_paired_t_test_equals_scipy():
    generator = np.random.default_rng(3)
    for n in (2, 3, 5, 17):
        baseline, method = generator.normal(90, 1, n), generator.normal(90.5, 1, n)
        expected = stats.ttest_rel(method, baseline)
        found = paired_t_test(baseline, method, alpha=0.1)
        assert (found["t_statistic"], found["p_value"]) == pytest.approx((expected.statistic, expected.pvalue))
        assert found["confidence_interval"] == pytest.approx(tuple(expected.confidence_interval(0.9)))
        assert found["significant"] == (expected.pvalue < 0.1)


def test_equal_differences_have_no_spread():
    assert paired_t_test([1.0, 2.0], [1.0, 2.0])["p_value"] == 1.0
    assert paired_t_test([90.1, 90.2, 90.3], [91.1, 91.2, 91.3])["t_statistic"] == math.inf


def test_mean_interval_equals_scipy():
    values = [75.97, 75.95, 75.96, 75.98, 75.94]
    found = mean_interval(values)
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found.lo, found.hi) == pytest.approx(expected)


def test_bootstrap_is_deterministic_and_near_scipy():
    data = np.random.default_rng(0).normal(50, 5, 40)
    lo, hi = bootstrap_confidence_interval(data)
    expected = stats.bootstrap((data,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(1))
    assert (lo, hi) == bootstrap_confidence_interval(data)
    assert (lo, hi) == pytest.approx(tuple(expected.confidence_interval), abs=0.15)
    assert lo < data.mean() < hi


def test_bootstrap_leaves_numpy_state_alone():
    np.random.seed(5)
    expected = np.random.RandomState(5).random()
    bootstrap_confidence_interval([1.0, 2.0, 4.0])
    assert np.random.random() == expected


def test_median_interval_of_five_is_their_range():
    found = median_interval([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (found.value, found.lo, found.hi) == (3.0, 1.0, 5.0)


def test_interval_changes_kind_at_ten_pairs():
    assert paired_difference(DRUG_2[:9], DRUG_1[:9]).kind == "paired t"
    found = paired_difference(DRUG_2, DRUG_1)
    assert found.kind == "paired bootstrap" and found.interval == found.bootstrap


def test_holm_by_hand():
    # Sorted .01, .02, .03, .04 times 4, 3, 2, 1 = .04, .06, .06, .04; the last may not fall below its predecessor.
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.02}) == pytest.approx({"a": .04, "b": .06, "c": .06, "d": .06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_non_inferiority_is_the_shifted_one_sided_t_test():
    reference, method = [93.1, 93.3, 93.0, 93.4, 93.2], [93.0, 93.25, 93.05, 93.3, 93.15]
    found = non_inferiority(method, reference, margin=0.17)
    difference = np.subtract(method, reference)
    expected = stats.ttest_1samp(difference, -0.17, alternative="greater")
    assert found["p_value"] == pytest.approx(expected.pvalue)
    bound = difference.mean() - stats.t.ppf(0.975, 4) * difference.std(ddof=1) / math.sqrt(5)
    assert found["lower_bound"] == pytest.approx(bound)
    assert found["holds"] == (bound > -0.17) == (expected.pvalue < 0.025)


def test_crossed_bootstrap_covers_images_and_seeds():
    generator = np.random.default_rng(1)
    reference = np.tile(generator.random(4000) < 0.9, (5, 1))
    method = reference.copy()
    method[:, :40] = False
    found = crossed_bootstrap(method, reference)
    assert found.value == pytest.approx(100 * (method.mean() - reference.mean()))
    # Seeds agree, so only images vary: the binomial standard error of the images that differ.
    share = -found.value / 100
    error = 100 * math.sqrt(share * (1 - share) / 4000)
    assert found.hi - found.lo == pytest.approx(2 * 1.96 * error, rel=0.1)
    brute = _crossed_by_hand(method, reference, 400)
    assert found.lo == pytest.approx(np.quantile(brute, 0.025), abs=0.1)


def _crossed_by_hand(method, reference, resamples):
    generator, difference = np.random.default_rng(9), method.astype(float) - reference
    seeds, images = difference.shape
    return [100 * difference[np.ix_(generator.integers(0, seeds, seeds), generator.integers(0, images, images))].mean()
            for _ in range(resamples)]


def test_wilcoxon_reach():
    assert smallest_wilcoxon_p(5) == 0.0625  # five seeds cannot reach .05 at all
    assert seeds_needed(0.05) == 6
    assert seeds_needed(0.05, comparisons=5) == 8
    differences = [0.3, 0.5, 0.2, 0.9, 0.4, 0.35, 0.6, 0.8]
    assert exact_wilcoxon(differences, np.zeros(8), comparisons=5) == smallest_wilcoxon_p(8)
    with pytest.raises(UserError, match="n = 5 pairs it cannot go below 0.0625.*8 seeds would do"):
        exact_wilcoxon([1, 2, 3, 4, 5], [0, 0, 0, 0, 0], comparisons=5)


def test_run_statistical_analysis():
    generator = np.random.default_rng(2)
    results = {"unpruned": generator.normal(93, 0.1, 5), "a": generator.normal(92, 0.1, 5),
               "b": generator.normal(92.9, 0.1, 5)}
    found = run_statistical_analysis(results)
    assert found["baseline"] == "unpruned" and list(found["methods"]) == list(results)
    single = {name: paired_t_test(results["unpruned"], results[name]) for name in "ab"}
    adjusted = holm({name: test["p_value"] for name, test in single.items()})
    for name, test in found["comparisons"].items():
        assert test["t_statistic"] == single[name]["t_statistic"] and test["p_adjusted"] == adjusted[name]
        assert test["wilcoxon_p"] is None and "7 seeds would do" in test["wilcoxon_note"]
        assert test["bootstrap_interval"][0] < test["mean_difference"] < test["bootstrap_interval"][1]
    assert found["methods"]["a"]["std"] == pytest.approx(np.std(results["a"], ddof=1))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: paired_t_test([1, 2, 3], [1, 2]), "method has 2 values and baseline 3"),
    (lambda: paired_t_test([1], [2]), "at least 2 numbers"),
    (lambda: paired_t_test([1, 2], [1, math.nan]), r"method holds NaN or infinity at position \[1\]"),
    (lambda: paired_t_test([1, 2], [1, 3], alpha=5), "alpha is 5; it must lie between 0 and 1"),
    (lambda: bootstrap_confidence_interval([1.0]), "at least 2 numbers"),
    (lambda: bootstrap_confidence_interval([1, 2], confidence=95), "confidence is 95"),
    (lambda: bootstrap_confidence_interval([1, 2], n_bootstrap=0), "n_bootstrap is 0"),
    (lambda: bootstrap_confidence_interval(["x", "y"]), "must be numbers"),
    (lambda: non_inferiority([1, 2], [1, 2], margin=0), "margin is 0"),
    (lambda: run_statistical_analysis({"a": [1, 2]}, "dens"), "'dens' is not in results"),
])
def test_refusals_say_what_and_why(call, message):
    with pytest.raises(UserError, match=message):
        call()
