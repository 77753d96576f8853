"""Makes a few problems of a generator in a process of its own, and scores answers to them. Started by generators.py.

JSON in, {"dataset", "config", "indices"}; JSON out:

    {"evaluates": whether the scorer evaluates answers as Python,
     "problems": [{"made": [question, answer], "score": of the answer as a response can give it,
                   "wrong": {a wrong answer: its score}}]}
"""

import json
import math
import os
import sys
import types

# Right for no problem.
NO_ANSWERS = ("", "I do not know", "nan")
# Right for some, but not for most.
CONSTANTS = ("0", "1", "None", "[]", "True")
_MARK = 7700123  # a number that occurs in no problem: code that has it among its constants comes from an answer
_MARKED = ("[{}]", "[[{}]]", "x + {}")


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # generators may print
    import reasoning_gym

    asked = json.load(sys.stdin)
    data = reasoning_gym.create_dataset(asked["dataset"], seed=0, **asked["config"])
    entries = [data[index] for index in asked["indices"]]
    problems = []
    for number, entry in enumerate(entries):
        stored = entry["answer"]
        others = [other["answer"] for other in (entries[number - 1], entries[number - 3])]
        wrong = [a for a in (*NO_ANSWERS, *CONSTANTS, *others) if isinstance(a, str) and not _same(a, stored)]
        problems.append(
            {
                "made": [entry["question"], stored],
                "score": _score(data, stored.strip() if isinstance(stored, str) else stored, entry),
                "wrong": {answer: _score(data, answer, entry, failed=0.0) for answer in wrong},
                "others": [answer for answer in wrong if answer in others],
            }
        )
    json.dump({"evaluates": _evaluates(data, entries[:2]), "problems": problems}, out)
    out.close()


def _score(data, answer, entry, failed=None) -> float:
    """The score; `failed` where the scorer raises, unless that is None."""
    try:
        score = float(data.score_answer(answer, entry))
    except Exception:
        if failed is None:
            raise
        return failed
    return score if math.isfinite(score) else 0.0


def _same(answer: str, stored) -> bool:
    """Whether two answers are the same text or number."""
    if answer.strip() == str(stored).strip():
        return True
    try:
        return float(answer) == float(stored)
    except (TypeError, ValueError):
        return False


def _evaluates(data, entries) -> bool:
    """Whether code is run that was made from an answer. The answers tried are numbers in brackets and sums."""
    found = []

    def watch(event, arguments):
        if event == "exec" and isinstance(arguments[0], types.CodeType) and _has_mark(arguments[0]):
            found.append(event)

    sys.addaudithook(watch)
    for entry in entries:
        for text in (*_MARKED, str(entry["answer"]).replace("{", "").replace("}", "") + " + {}"):
            _score(data, text.format(_MARK), entry, failed=0.0)
    return bool(found)


def _has_mark(code: types.CodeType) -> bool:
    return any(c == _MARK or (isinstance(c, types.CodeType) and _has_mark(c)) for c in code.co_consts)


if __name__ == "__main__":
    main()
