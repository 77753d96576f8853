"""Makes a few problems of a generator in a process of its own. Started by generators.py; JSON in, JSON out."""

import json
import os
import sys


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # generators may print
    import reasoning_gym

    asked = json.load(sys.stdin)
    data = reasoning_gym.create_dataset(asked["dataset"], seed=0, **asked["config"])
    found = []
    for index in asked["indices"]:
        entry = data[index]
        score = float(data.score_answer(entry["answer"], entry))
        found.append({"made": [entry["question"], entry["answer"]], "score": score})
    json.dump(found, out)
    out.close()


if __name__ == "__main__":
    main()
