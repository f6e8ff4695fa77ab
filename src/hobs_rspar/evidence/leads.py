"""The method against every rival, paired by seed, and how many seeds would show the difference that was seen."""

from __future__ import annotations

import math

from scipy import stats

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.statistics import Difference
from hobs_rspar.evidence.summary import OURS, Summary
from hobs_rspar.evidence.table_formats import Column, Table
from hobs_rspar.evidence.tables import conditions, subject

POWER, MOST = 0.8, 200  # chance to find the difference; more seeds than that nobody runs
COLUMNS = (
    Column("rival", "Rival"),
    Column("n", "Pairs"),
    Column("lead", f"Lead of {OURS} (points)", 4, 2),
    Column("lo", "95 % from", 4, 2),
    Column("hi", "to", 4, 2),
    Column("bootstrap_lo", "Bootstrap: from", 4, 2),
    Column("bootstrap_hi", "to", 4, 2),
    Column("effect_size", "Effect size (d_z)", 4, 2),
    Column("p_value", "p", 6, 3),
    Column("p_adjusted", "Adjusted p", 6, 3),
    Column("seeds", "Seeds that would show it"),
)


def paired(evidence: Evidence, summary: Summary) -> Table | None:
    """A row per rival, the smallest lead first; None where there is no rival with two common seeds."""
    if not summary.leads:
        return None
    level = evidence.alpha / len(summary.leads)
    rows = [_row(name, lead, summary.adjusted[name], level)
            for name, lead in sorted(summary.leads.items(), key=lambda item: item[1].interval.value)]
    note = (f"Test top-1, {OURS} minus rival, paired by seed; paired t-test, adjusted by Holm over {len(rows)} rivals. "
            f"Effect size: mean over standard deviation of the differences. Seeds: with differences of this mean and "
            f"spread, as many would be significant with {POWER:.0%} chance at the strictest step of the correction "
            f"(level {level:.2g}); > {MOST}: more. {conditions(evidence)}.")
    return Table("leads", f"Lead over every rival: {subject(evidence)}, {summary.n}", note, COLUMNS, rows)


def seeds_for(effect: float, level: float, power: float = POWER) -> int | None:
    """The fewest pairs with which a two-sided paired t-test finds an effect size d_z; None for more than ``MOST``.

    From the noncentral t distribution (Cohen 1988, section 2.3).
    """
    for pairs in range(2, MOST + 1):
        critical = stats.t.ppf(1 - level / 2, pairs - 1)
        shift = abs(effect) * math.sqrt(pairs)
        if stats.nct.sf(critical, pairs - 1, shift) + stats.nct.cdf(-critical, pairs - 1, shift) >= power:
            return pairs
    return None


def _row(name: str, lead: Difference, adjusted: float, level: float) -> dict:
    needed = seeds_for(lead.effect_size, level) if math.isfinite(lead.effect_size) else 2
    return {"rival": name, "n": lead.n, "lead": lead.interval.value, "lo": lead.interval.lo, "hi": lead.interval.hi,
            "bootstrap_lo": lead.bootstrap.lo, "bootstrap_hi": lead.bootstrap.hi, "effect_size": lead.effect_size,
            "p_value": lead.p_value, "p_adjusted": adjusted, "seeds": f"> {MOST}" if needed is None else str(needed)}
