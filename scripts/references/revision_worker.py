"""Run the programs of a workload with another revision of this project; benchmark.py starts it.

    python revision_worker.py TREE WORKLOAD.json

TREE is a checkout of that revision. The programs themselves are those of this tree (benchmarks/programs.py); here is
what they need to know of an older one.
"""

import importlib
import json
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]
LEARNERS = ("r2vpo_jax.training.learner", "r2vpo_jax.learner")  # where `Learner` is, newest first


def learner_class():
    """`Learner`, wherever this revision has it."""
    for name in LEARNERS:
        try:
            return importlib.import_module(name).Learner
        except ModuleNotFoundError as error:
            if not (name + ".").startswith(f"{error.name}."):  # it is there, but something that it imports is not
                raise
    raise ModuleNotFoundError(f"no Learner in {' or '.join(LEARNERS)}")


def main(tree, workload):
    sys.path[:0] = [tree, str(SCRIPTS)]
    import r2vpo_jax

    found = Path(r2vpo_jax.__file__).resolve().parents[1]
    if found != Path(tree).resolve():
        raise SystemExit(f"r2vpo_jax was found in {found}, not in {tree}")

    from benchmarks import programs, subjects, workloads

    subjects.forget_compiled()
    fields = json.loads(Path(workload).read_text(encoding="utf-8"))
    from references.serving import serve

    serve(programs.Programs(workloads.Workload(**fields), learner_class()))


if __name__ == "__main__":
    main(*sys.argv[1:])
