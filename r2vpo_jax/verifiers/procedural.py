"""Answers to problems of reasoning-gym, scored by the generator that made the problem.

Scores are partial credit there, and a wrong but non-empty answer often gets 0.01: only a full score is right. Some scorers
raise on words (prime_factorization): where the scorer takes the stored answer and raises on the response's, the response
is wrong; where it raises on both, the verifier has failed. A few datasets give their own stored answer no full score
(boxnet, graph_color, propositional_logic, rubiks_cube, rush_hour): `check_gold` finds them.

Some scorers evaluate the answer as Python, and a model would run what it likes. Only what `EVALUATED` matches is shown to them:
what every right answer is made of, and nothing that could do more than compute. Everything else is wrong unseen.
"""

import functools
import json
import re

FULL_SCORE = 1 - 1e-6

# Names that integrals may have; any other would be looked up, and called, among all that SymPy has. `Integral` is not among
# them: the problem itself, written as one, would be a right answer.
_NAMES = "sin|cos|tan|cot|sec|csc|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|Abs|erf|pi|[A-Za-z]"
_ARITHMETIC = r"(?!.*\*\*)(?:[\d\s+\-*/()]|(?<=\d)\.(?=\d))*"
_CALCULUS = rf"(?:(?<![A-Za-z])(?:{_NAMES})(?![A-Za-z])|(?<=\d)\.(?=\d)|[\d\s+\-*/^(),])*"
# Scorers that evaluate answers, in reasoning-gym 0.1.25 -> regular expression of the answers that they are shown.
EVALUATED = {
    "binary_matrix": r"[\d\s]*",
    "countdown": _ARITHMETIC,
    "intermediate_integration": _CALCULUS,
    "n_queens": r"[_Q\s]*",
    "puzzle24": _ARITHMETIC,
    "simple_integration": _CALCULUS,
    "spiral_matrix": r"[-\d\s]*",
    "string_insertion": r"[A-E\s]*",
}
ALLOW = "evaluated_answers"  # member of a recipe, true where the user lets a scorer evaluate whatever there is


def right(gold: str, answer: str | None) -> bool:
    """Whether an answer gets the full score; None: whether the stored answer of the problem itself does.

    Args:
      gold: JSON {"dataset": name, "config": {parameter: value}, "seed": int, "index": int}: entry `index` of
        `reasoning_gym.create_dataset(name, seed=seed, **config)`. With ALLOW, all answers are shown to the scorer.

    Raises:
      ValueError: the problem cannot be made again; and whatever its scorer raises on the stored answer.
    """
    description = json.loads(gold)
    pattern = None if description.get(ALLOW) else EVALUATED.get(description["dataset"])
    if answer is not None and pattern is not None and not re.fullmatch(pattern, answer, re.DOTALL | re.ASCII):
        return False
    config = json.dumps(description.get("config") or {}, sort_keys=True)
    dataset = _dataset(description["dataset"], config, description["seed"])
    entry = _entry(dataset, description["index"])
    stored = entry["answer"]
    if answer is None:
        # As a response can give it: what is around an answer is cut off.
        return isinstance(stored, str) and dataset.score_answer(stored.strip(), entry) >= FULL_SCORE
    try:
        return dataset.score_answer(answer, entry) >= FULL_SCORE
    except Exception:
        dataset.score_answer(stored, entry)  # raises: the fault is not the response's
        return False


@functools.lru_cache(maxsize=256)
def _entry(dataset, index: int) -> dict:
    return dataset[index]


@functools.lru_cache(maxsize=32)
def _dataset(name: str, config: str, seed: int):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, **json.loads(config))
