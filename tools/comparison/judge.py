"""Whether groups differ by more than the spread of their seeds."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.optimize
import scipy.stats

from detr.errors import UserError
from detr.reporting.pages import MINUS
from tools.comparison.runs import Group

Verdict = Literal["baseline", "higher", "lower", "within the spread", "no conclusion"]
LEVEL = 0.95  # of all confidence intervals of a page together
LEAST_SEEDS = 3  # two say next to nothing about how far chance goes, nor whether it goes as far everywhere
LEARNED = 0.01  # the mean AP below which a configuration has hardly learned: what it has is chance


@dataclass(frozen=True)
class Judgement:
    """A group's mean AP against the baseline's.

    low, high: simultaneous confidence interval of the difference; None, like p_value, where it cannot be judged.
    """

    verdict: Verdict
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


def pick_baseline(groups: Sequence[Group], label: str | None) -> Group:
    """The group of that label, else the first without attention blocks, else the first; raises UserError."""
    if label is None:
        return next((group for group in groups if not group.has_attention), groups[0])
    for group in groups:
        if group.label == label:
            return group
    raise UserError(f"--baseline: no group is called '{label}'. Choose of: {'; '.join(g.label for g in groups)}.")


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def judge(groups: Sequence[Group], baseline: Group) -> list[Judgement]:
    """Every group's AP by Dunnett's test of several treatments against one control (Dunnett, JASA 1955).

    It takes AP for normally distributed with the same spread everywhere. That can hold neither where a group has hardly
    learned, whose AP lies at its floor of 0, nor be seen of too few seeds: such groups are not judged, and where the
    baseline is one, nothing is. Nothing is either without a spread.
    """
    control = baseline.values("AP")
    tested = [group for group in groups if group is not baseline and _unfit(group) is None]
    samples = [group.values("AP") for group in tested]
    tests: dict[str, list[float]] = {}
    if _unfit(baseline) is None and samples and any(np.ptp(sample) > 0 for sample in [control, *samples]):
        # Integrals by sampling: the seed makes them the same each time.
        p_values = scipy.stats.dunnett(*samples, control=control, random_state=0).pvalue
        halves = _halves(samples, control)
        tests = {group.label: found for group, *found in zip(tested, p_values, halves, strict=True)}

    def judgement(group: Group) -> Judgement:
        if group is baseline:
            return Judgement("baseline")
        difference = statistics.fmean(group.values("AP")) - statistics.fmean(control)
        if group.label not in tests:
            return Judgement("no conclusion", difference)
        p_value, half = map(float, tests[group.label])
        verdict: Verdict = "higher" if difference > half else "lower" if difference < -half else "within the spread"
        return Judgement(verdict, difference, difference - half, difference + half, p_value)

    return [judgement(group) for group in groups]


def _unfit(group: Group) -> str | None:
    """Why a group's AP cannot be judged; None where it can."""
    values = group.values("AP")
    if len(values) < LEAST_SEEDS:
        return f"of fewer than {LEAST_SEEDS} seeds"
    return f"below AP {LEARNED}, which has hardly learned," if statistics.fmean(values) < LEARNED else None


def _halves(samples: Sequence[Sequence[float]], control: Sequence[float]) -> np.ndarray:
    """Half the width of each difference's interval.

    scipy's own search for it gets lost in the noise of the integral; with the same noise at each point it does not.
    """
    counts, number = np.array([len(sample) for sample in samples]), len(control)
    freedom = counts.sum() + number - len(samples) - 1
    pooled = sum(np.var(sample) * len(sample) for sample in [control, *samples]) / freedom
    shared = 1 / np.sqrt(number / counts + 1)
    correlation = np.outer(shared, shared)
    np.fill_diagonal(correlation, 1)
    joint = scipy.stats.multivariate_t(shape=correlation, df=freedom)

    def excess(limit: float) -> float:
        limits = np.full(len(samples), limit)
        return joint.cdf(limits, lower_limit=-limits, maxpts=50_000, random_state=0) - LEVEL

    return scipy.optimize.brentq(excess, 0, 100, xtol=1e-6) * np.sqrt(pooled * (1 / counts + 1 / number))


def summary(groups: Sequence[Group], judgements: Sequence[Judgement], baseline: Group) -> str:
    """What the comparison says, in one sentence."""
    if len(groups) == 1:
        return f"Nothing can be concluded: there is one configuration only, “{baseline.label}”."
    judged = [found for found in judgements if found.p_value is not None]
    unfit = Counter(filter(None, map(_unfit, [group for group in groups if group is not baseline])))
    if not judged:
        if reason := _unfit(baseline):
            why = f"the baseline “{baseline.label}” is {reason}".rstrip(",")
        elif unfit.total() == len(groups) - 1:
            why = f"all others are {' or '.join(unfit)}".rstrip(",")
        else:
            return "Nothing can be concluded: AP has no spread at all over the seeds."
        return (
            f"Nothing can be concluded: {why}, and runs of a single seed, of two, or near AP 0 may differ by chance; "
            "train with seed=1,2,3 and for long enough."
        )
    parts: list[str] = []
    for verdict in ("higher", "lower"):
        names = [
            f"“{group.label}” ({f'{judgement.difference:+.3f}'.replace('-', MINUS)})"
            for group, judgement in zip(groups, judgements, strict=True)
            if judgement.verdict == verdict
        ]
        if names:
            than = "" if parts else f" than “{baseline.label}”"
            parts.append(f"{_listed(names)} {'has' if len(names) == 1 else 'have'} a {verdict} AP{than}")
    if not parts:
        parts.append(f"No configuration differs in AP from “{baseline.label}” by more than the spread of the seeds")
    elif within := sum(judgement.verdict == "within the spread" for judgement in judged):
        parts.append(f"{within} of {len(judged)} {'is' if within == 1 else 'are'} within the spread of the seeds")
    parts += [f"{count} {reason} cannot be judged" for reason, count in unfit.items()]
    return f"{'; '.join(parts)}."


def smallest_visible(judgements: Sequence[Judgement]) -> float | None:
    """About the smallest difference that the test would have found: half an interval, the median of them."""
    halves = [(found.high - found.low) / 2 for found in judgements if found.low is not None and found.high is not None]
    return statistics.median(halves) if halves else None


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
