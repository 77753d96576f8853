"""Keeps the splits of a run apart, and knows them again."""

import hashlib
from collections.abc import Mapping

from r2vpo_jax.data.base import Dataset, same_question

SHARED = "also in validation or test"


def disjoint(data: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The same splits, without training problems that are also in validation or test; `counts` says how many.

    Compares the finite parts, by question, without regard to white space and letter case. Generators keep their own
    splits apart.

    Raises:
      ValueError: validation and test share problems, or nothing is left to train on.
    """
    data = dict(data)
    held_out: dict[str, str] = {}
    for split in ("validation", "test"):
        if split not in data:
            continue
        questions = {same_question(example.question): example.question for example in data[split].examples()}
        if both := questions.keys() & held_out.keys():
            shown = "; ".join(repr(questions[key][:80]) for key in sorted(both)[:3])
            raise ValueError(
                f"validation and test share {len(both)} problems, such as {shown}. Choose other data, or other rows of "
                "it: rows=:500 for the one and rows=500: for the other"
            )
        held_out |= questions
    if "train" in data and held_out:
        keep = [same_question(example.question) not in held_out for example in data["train"].examples()]
        if keep and not any(keep) and data["train"].num_examples is not None:
            raise ValueError("all training problems are also in validation or test; choose other rows by rows=a:b")
        if not all(keep):
            data["train"] = data["train"].select(keep, SHARED)
    return data


def digest(data: Mapping[str, Dataset]) -> str:
    """SHA-256, hexadecimal, of all splits: equal for equal data."""
    text = "\n".join(f"{split} {data[split].digest}" for split in sorted(data))
    return hashlib.sha256(text.encode()).hexdigest()
