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


def learner_class(tree):
    """`Learner`, wherever this revision has it."""
    # By file, not by trying: an installed package would fill in a module that the tree does not have.
    name = next(name for name in LEARNERS if Path(tree, *name.split(".")).with_suffix(".py").exists())
    return importlib.import_module(name).Learner


def main(tree, workload):
    sys.path[:0] = [tree, str(SCRIPTS)]
    import r2vpo_jax

    found = Path(r2vpo_jax.__file__).resolve().parents[1]
    if found != Path(tree).resolve():
        raise SystemExit(f"r2vpo_jax was found in {found}, not in {tree}")

    from benchmarks import programs, subjects, workloads
    from references.serving import serve

    subjects.forget_compiled()
    fields = json.loads(Path(workload).read_text(encoding="utf-8"))
    serve(programs.Programs(workloads.Workload(**fields), learner_class(tree)))


if __name__ == "__main__":
    main(*sys.argv[1:])
