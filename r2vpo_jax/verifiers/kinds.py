"""How an answer is judged: one row for each kind that a data set can name.

Imports nothing at first, so that verifier processes start fast; what a kind needs is imported in the process that judges.
"""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way to compare an answer with the gold answer."""

    judge: Callable[[dict], bool]  # of a request with gold, answer and tolerance; may raise
    warm_up: Callable[[], None] | None = None  # imports and first calls, outside the time limit of the items
    package: tuple[str, str] | None = None  # (module, name on the package index) that it needs
    own_problems: bool = False  # judges problems that it made itself: rows of a data set cannot name it


def _exact(request: dict) -> bool:
    from r2vpo_jax.verifiers import answers

    return answers.exact(request["gold"], request["answer"])


def _numeric(request: dict) -> bool:
    from r2vpo_jax.verifiers import answers

    return answers.numeric(request["gold"], request["answer"], request["tolerance"])


def _math(request: dict) -> bool:
    from r2vpo_jax.verifiers import answers

    return answers.same(request["gold"], request["answer"])


def _warm_up_math() -> None:
    from r2vpo_jax.verifiers import answers

    for gold, answer in ((r"\sqrt{8}", r"2\sqrt{2}"), ("x^2-1", "(x-1)(x+1)"), ("(0,1]", "0<x\\le 1")):
        answers.same(gold, answer)


def _reasoning_gym(request: dict) -> bool:
    from r2vpo_jax.verifiers import procedural

    return procedural.right(request["gold"], request["answer"])


def _warm_up_reasoning_gym() -> None:
    import reasoning_gym  # noqa: F401


KINDS = {
    "math": Kind(_math, _warm_up_math, package=("math_verify", "math-verify")),
    "numeric": Kind(_numeric),
    "exact": Kind(_exact),
    "reasoning_gym": Kind(
        _reasoning_gym, _warm_up_reasoning_gym, package=("reasoning_gym", "reasoning-gym"), own_problems=True
    ),
}
