"""Answers to problems of reasoning-gym, scored by the generator that made the problem.

Scores are partial credit there, and a wrong but non-empty answer often gets 0.01: only a full score is right. Some scorers
raise on words (prime_factorization): where the scorer takes the stored answer and raises on the response's, the response
is wrong; where it raises on both, the verifier has failed. A few datasets give their own stored answer no full score
(boxnet, graph_color, propositional_logic, rubiks_cube, rush_hour): `check_gold` finds them.
"""

import functools
import json

FULL_SCORE = 1 - 1e-6


def right(gold: str, answer: str | None) -> bool:
    """Whether an answer gets the full score; None: whether the stored answer of the problem itself does.

    Args:
      gold: JSON {"dataset": name, "config": {parameter: value}, "seed": int, "index": int}: entry `index` of
        `reasoning_gym.create_dataset(name, seed=seed, **config)`.

    Raises:
      ValueError: the problem cannot be made again; and whatever its scorer raises on the stored answer.
    """
    description = json.loads(gold)
    config = json.dumps(description.get("config") or {}, sort_keys=True)
    dataset = _dataset(description["dataset"], config, description["seed"])
    entry = _entry(dataset, description["index"])
    stored = entry["answer"]
    if answer is None:
        return stored is not None and dataset.score_answer(stored, entry) >= FULL_SCORE
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
