"""Ratios that can be trusted on a machine that others use too: contestants take turns, and each is compared with its neighbours in time."""

import statistics
from dataclasses import dataclass, field

from .cases import tell

NOISE = 5.0  # Microseconds a step by which the loop may differ from itself
SHARE = 0.01  # Or this share of a step, where that is more


def quartiles(values):
    "First quartile, median, third quartile"
    values = sorted(values)
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else tuple(values) * 3


def spread(values, form="{:.2f}"):
    "`median [first quartile, third quartile]`"
    low, middle, high = (form.format(o) for o in quartiles(values))
    return f"{middle} [{low}, {high}]"


@dataclass
class Pairs:
    "The fits of one contestant, each with the fits of the bases that ran just before and just after it"

    name: str
    fits: list = field(default_factory=list)
    bases: dict = field(default_factory=dict)  # Name of the base -> a list of two fits for each fit
    error: str = ""

    def ratios(self, base, cost):
        "Cost of each fit over the mean cost of its two neighbours; `cost` turns a fit into a number"
        return [cost(fit) / _mean(near, cost) for fit, near in zip(self.fits, self.bases[base])]

    def differences(self, base, cost):
        "Cost of each fit less that of its neighbours"
        return [cost(fit) - _mean(near, cost) for fit, near in zip(self.fits, self.bases[base])]

    def best(self, base, costs):
        "The cheapest of all against the cheapest of all neighbours; `costs` turns a fit into numbers"
        return min(o for fit in self.fits for o in costs(fit)) / min(o for near in self.bases[base] for fit in near for o in costs(fit))


def _mean(fits, cost):
    return sum(cost(fit) for fit in fits) / len(fits)


def take_turns(contestants, bases, once, rounds, renew=lambda: None):
    """Fits of all contestants in rotating order, with a fit of each base between any two of them; returns `{name: Pairs}`.

    `once` turns a contestant into a `Fit`, and has warmed up before it counts; `renew` is called before each round. A contestant that fails is
    left out from there on, and its error is kept.
    """
    results = {name: Pairs(name, bases={base: [] for base in bases}) for name in contestants}
    for number in range(rounds):
        renew()
        live = [name for name in contestants if not results[name].error]
        order = live[number % len(live):] + live[: number % len(live)] if live else []
        before = {base: once(bases[base]) for base in bases}
        for place, name in enumerate(order):
            fit = _attempt(results[name], contestants[name], once)
            turned = reversed(bases) if place % 2 == 0 else bases
            after = {base: once(bases[base]) for base in turned}
            if fit is not None:
                results[name].fits.append(fit)
                for base in bases:
                    results[name].bases[base].append((before[base], after[base]))
            before = after
        tell(f"  round {number + 1} of {rounds}")
    return results


def _attempt(pairs, contestant, once):
    "A fit, or nothing and the error kept"
    try:
        return once(contestant)
    except Exception as error:
        pairs.error = f"{type(error).__name__}: {error}"
        return None


def is_void(again, step):
    "Whether the loop differs from itself by more than noise may: microseconds more a step, and what a step costs"
    return abs(again) > max(NOISE, SHARE * step)
