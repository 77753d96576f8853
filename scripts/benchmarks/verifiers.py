"""Prints verifications a second by kind and number of processes, the time to start, and what one timeout costs.

    python scripts/benchmark.py verifiers [--seconds=3]

The pairs are made up here. Rates depend on the machine and on what else it is doing: read the ratios within one run.
"""

import argparse
import os
import time

from r2vpo_jax.verifiers import Check, VerifierPool
from r2vpo_jax.verifiers.outcome import Outcome


def _name(n) -> str:
    return "anna" + "".join(chr(ord("a") + int(digit)) for digit in str(n))


# kind, what it is -> the n-th pair (gold, right answer)
SETS = {
    ("exact", "words"): lambda n: (_name(n), rf"\text{{{_name(n).title()}}}"),
    ("numeric", "fractions"): lambda n: (f"{n}/7", rf"\frac{{{2 * n}}}{{14}}"),
    ("math", "integers"): lambda n: (str(n), f"{n}.0"),
    ("math", "tuples of numbers"): lambda n: (f"({n}, 1/2)", rf"\left({n},\frac12\right)"),
    ("math", "roots"): lambda n: (rf"\sqrt{{{4 * n}}}", rf"2\sqrt{{{n}}}"),
    ("math", "polynomials"): lambda n: (f"x^2+{2 * n}x+{n * n}", f"(x+{n})^2"),
}


def rate(pool, kind, pair, seconds) -> float:
    """Verifications a second, in calls of 64."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        pairs = [pair(n) for n in range(count + 1, count + 65)]
        judgements = pool.check([Check(kind, gold, rf"Thus \boxed{{{answer}}}.") for gold, answer in pairs])
        wrong = [pair for pair, j in zip(pairs, judgements, strict=True) if j.outcome != Outcome.RIGHT]
        assert not wrong, wrong[0]
        count += len(pairs)
    return count / (time.perf_counter() - start)


def first(kind) -> float:
    """Seconds from no process to the first verdict."""
    start = time.perf_counter()
    with VerifierPool(num_workers=1) as pool:
        pool.check([Check(kind, "1/2", r"\boxed{0.5}")])
        return time.perf_counter() - start


def timeout(limit) -> float:
    """Seconds that an expression without end costs beside one that ends, with two processes that are ready."""
    good, endless = Check("math", r"\sqrt{8}", r"\boxed{2\sqrt{2}}"), Check("math", "5", r"\boxed{9^{9^{9^{9}}}}")
    with VerifierPool(num_workers=2, time_limit=limit) as pool:
        pool.check([good, Check("math", r"\sqrt{8}", r"\boxed{\sqrt{9}}")])
        start = time.perf_counter()
        outcomes = [v.outcome for v in pool.check([endless, good])]
        assert outcomes == [Outcome.TIMEOUT, Outcome.RIGHT], outcomes
        return time.perf_counter() - start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each rate")


def run(seconds: float) -> None:
    """Prints everything; `seconds` for each rate."""
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print(f"{'kind':8} {'answers':18} {'1 process':>12} {'2 processes':>12} {'ratio':>6}   verifications/s")
    for (kind, name), pair in SETS.items():
        rates = []
        for num_workers in (1, 2):
            with VerifierPool(num_workers=num_workers) as pool:
                pool.check(
                    [Check(kind, *[text.format(n) for text in ("{}/3", r"\boxed{{{}/3}}")]) for n in range(1, 5)]
                )
                rates.append(rate(pool, kind, pair, seconds))
        print(f"{kind:8} {name:18} {rates[0]:12.0f} {rates[1]:12.0f} {rates[1] / rates[0]:6.2f}")
    print()
    for kind in ("exact", "math"):
        print(f"first verdict of kind {kind}: {first(kind):.2f} s after nothing")
    for limit in (0.5, 2.0):
        print(f"one endless expression with time_limit={limit:g} s: {timeout(limit):.2f} s")
