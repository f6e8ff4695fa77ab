"""Claim C8, does PPO allocate better than rules and other searches: ``python benchmarks/allocators.py`` (3 minutes).

All allocators choose widths of the study's dense network under its budget, on the same two rewards (a separable one and
the joint second-order model), first with equal evaluations, then with equal seconds, over five seeds. Every search
begins with uniform widths. Annealing, CMA-ES, DQN and PPO had four trials of their constants each, on seeds 100 to 102.
"""

import time
from collections.abc import Callable

import numpy as np

from _allocation import Problem, load
from _experiment import run
from hobs_rspar.allocation import annealing, cmaes, dqn, dynamic, greedy, local_search, ppo_search, random_search, trial
from hobs_rspar.allocation.threshold import threshold_widths
from hobs_rspar.allocation.trial import Result, Reward
from hobs_rspar.evidence.statistics import Interval, mean_interval, paired_difference
from hobs_rspar.progress import bar
from hobs_rspar.seeds import derived_seed

EVALUATIONS, SECONDS, SEEDS = 2000, 1.0, range(5)
UNLIMITED = 10**9  # evaluations, where seconds are the limit
ALLOCATIONS, ROUNDS = 10_000, 10  # scored at once when the rewards are timed
OURS, RIVAL = "PPO", "DP + local search"
SEARCHES = {"greedy": greedy, "local search": local_search, RIVAL: dynamic, "random search": random_search,
            "simulated annealing": annealing, "CMA-ES": cmaes, "DQN": dqn, OURS: ppo_search}
LIMITS = {f"{EVALUATIONS} evaluations": (EVALUATIONS, np.inf), f"{SECONDS:g} s": (UNLIMITED, SECONDS)}
Runs = dict[tuple[str, str, str], list[Result]]  # by reward, limit and allocator: one result per seed


def main() -> None:
    started = time.perf_counter()
    problem = load()
    rewards = {"separable": problem.separable(), "joint": problem.joint()}
    speeds = [speed(problem, name, reward) for name, reward in rewards.items()]
    runs = searched(problem, rewards) | ruled(problem, rewards)
    leads = {(reward, limit): lead(runs, reward, limit) for reward in rewards for limit in LIMITS}
    (reward, limit), worst = min(leads.items(), key=lambda item: item[1].lo)
    record = {
        "claim": "C8", "measured": round(worst.value, 3), "lo": round(worst.lo, 3), "hi": round(worst.hi, 3),
        "unit": f"% of the gain of {RIVAL} over uniform widths, {OURS} − {RIVAL}",
        "holds": all(interval.lo >= 0 for interval in leads.values()), "reason": "",
        "conditions": conditions(problem, runs, speeds, f"{reward} reward, {limit}"),
        "seconds": round(time.perf_counter() - started, 1),
        "tables": [compared(problem, runs, leads), ratios(problem, runs), speed_table(speeds)]}
    problem.publish(record)


def searched(problem: Problem, rewards: dict[str, Reward]) -> Runs:
    """All searches under all limits, seed by seed, so that a slow spell of the machine meets all of them."""
    runs: Runs = {(reward, limit, name): [] for reward in rewards for limit in LIMITS for name in SEARCHES}
    for seed in bar(SEEDS, "allocators"):
        for (reward, limit, name), results in runs.items():
            generator = np.random.default_rng(derived_seed(seed, "allocators", name))
            evaluations, seconds = LIMITS[limit]
            results.append(trial.run(SEARCHES[name].search, rewards[reward], problem.space, evaluations, generator,
                                     seconds))
    return runs


def ruled(problem: Problem, rewards: dict[str, Reward]) -> Runs:
    """Uniform widths and one threshold on H-OBS's scores: rules without a search, equal under every limit and seed."""
    runs: Runs = {}
    space = problem.space
    for name, rule in (("uniform", lambda: space.uniform),
                       ("global threshold", lambda: threshold_widths(space, problem.scores))):
        for reward, scored in rewards.items():
            for limit in LIMITS:
                runs[reward, limit, name] = [one_shot(rule, scored) for _ in SEEDS]
    return runs


def one_shot(rule: Callable[[], np.ndarray], reward: Reward) -> Result:
    started = time.perf_counter()
    widths = rule()
    return Result(widths, float(reward.score(widths[None])[0]), [], 1, time.perf_counter() - started)


def lead(runs: Runs, reward: str, limit: str) -> Interval:
    """PPO minus DP with local search, paired by seed, in percent of what the latter gains over uniform widths."""
    ours, rival, uniform = (np.array([result.score for result in runs[reward, limit, name]])
                            for name in (OURS, RIVAL, "uniform"))
    gain = float((rival - uniform).mean())
    return paired_difference(100 * ours / gain, 100 * rival / gain).interval


def speed(problem: Problem, name: str, reward: Reward) -> dict:
    """Allocations per second of CPU time: scored, and projected on the budget and scored."""
    generator = np.random.default_rng(0)
    ratios = generator.uniform(0.1, 1, (ALLOCATIONS, len(problem.space.sizes)))
    widths = problem.space.project(ratios)
    scored = [seconds(lambda: reward.score(widths)) for _ in range(ROUNDS)]
    both = [seconds(lambda: reward.score(problem.space.project(ratios))) for _ in range(3)]
    return {"reward": name, "scored": round(ALLOCATIONS / np.median(scored)),
            "projected": round(ALLOCATIONS / np.median(both))}


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def compared(problem: Problem, runs: Runs, leads: dict[tuple[str, str], Interval]) -> dict:
    rows = []
    for reward in dict.fromkeys(key[0] for key in runs):
        best = max(result.score for key, results in runs.items() if key[0] == reward for result in results)
        uniform = runs[reward, next(iter(LIMITS)), "uniform"][0].score
        for limit in LIMITS:
            for name in ("uniform", "global threshold", *SEARCHES):
                rows.append({"reward": reward, "limit": limit, "allocator": name}
                            | summary(runs[reward, limit, name], uniform, best))
    gaps = "; ".join(f"{reward}, {limit}: {found.value:.2f} ({found.lo:.2f} to {found.hi:.2f})"
                     for (reward, limit), found in leads.items())
    return {"name": "T10_allocators", "title": f"Allocators compared: {problem.subject}, n = {len(SEEDS)} seeds",
            "note": f"Gain: 0 is uniform widths, 100 the best allocation found by anyone on that reward; 95 % t "
                    f"intervals over seeds (none where all seeds agree). Evaluations and seconds: medians; a search "
                    f"that ends by itself leaves the rest unused. Separable: minus the sum of relative output errors; "
                    f"joint: minus the second-order change of loss of all gates; the threshold is on H-OBS's scores. "
                    f"{OURS} − {RIVAL}, paired by seed, in % of the latter's gain: {gaps}.",
            "columns": [["reward", "Reward"], ["limit", "Equal"], ["allocator", "Allocator"], ["score", "Score, mean"],
                        ["gain", "Gain, %"], ["gain_lo", "from"], ["gain_hi", "to"],
                        ["evaluations", "Evaluations used"], ["seconds", "Seconds used"]],
            "rows": rows}


def summary(results: list[Result], uniform: float, best: float) -> dict:
    scores = np.array([result.score for result in results])
    gains = mean_interval(100 * (scores - uniform) / (best - uniform))
    spread = np.ptp(scores) > 0
    return {"score": round(float(scores.mean()), 5), "gain": round(gains.value, 2),
            "gain_lo": round(gains.lo, 2) if spread else None, "gain_hi": round(gains.hi, 2) if spread else None,
            "evaluations": int(np.median([result.evaluations for result in results])),
            "seconds": round(float(np.median([result.seconds for result in results])), 3)}


def ratios(problem: Problem, runs: Runs) -> dict:
    """Kept ratio of every group in the best run of each allocator."""
    limit, names = next(iter(LIMITS)), [group.name for group in problem.space.groups]
    rows = []
    for reward in dict.fromkeys(key[0] for key in runs):
        for allocator in ("uniform", "global threshold", *SEARCHES):
            best = max(runs[reward, limit, allocator], key=lambda result: result.score)
            kept = (best.widths / problem.space.sizes).round(3).tolist()
            rows.append({"reward": reward, "allocator": allocator} | dict(zip(names, kept)))
    return {"name": "T10_ratios", "title": f"Kept ratio per group: {problem.subject}, best of {len(SEEDS)} seeds",
            "note": f"At equal {limit}. A group is named after its first producer.",
            "columns": [["reward", "Reward"], ["allocator", "Allocator"], *([name, name] for name in names)],
            "rows": rows}


def speed_table(speeds: list[dict]) -> dict:
    return {"name": "T10_speed", "title": "Allocations per second of CPU time, one thread",
            "note": f"Median of {ROUNDS} (with projection: 3) batches of {ALLOCATIONS} random allocations.",
            "columns": [["reward", "Reward"], ["scored", "Scored/s"], ["projected", "Projected and scored/s"]],
            "rows": speeds}


def conditions(problem: Problem, runs: Runs, speeds: list[dict], worst: str) -> str:
    slowest = max(result.seconds for (_, limit, name), results in runs.items() if name == OURS
                  and limit == next(iter(LIMITS)) for result in results)
    return (f"{problem.subject}; n = {len(SEEDS)} seeds ({SEEDS[0]}–{SEEDS[-1]}), paired t interval; the worst of "
            f"{len(LIMITS) * 2} comparisons (2 rewards x {len(LIMITS)} limits): {worst}; {OURS} takes at most "
            f"{slowest:.1f} s for {EVALUATIONS} evaluations; {min(row['scored'] for row in speeds):,} allocations/s "
            f"scored, {min(row['projected'] for row in speeds):,} projected and scored; "
            f"{problem.params.allocation.threads} thread")


if __name__ == "__main__":
    run(main)
