"""How far a run has come, for scripts that cannot look into a store themselves.

python -m r2vpo_jax.run.progress gs://bucket/run      # "12 done" or "12 going": the last iteration with a checkpoint
"""

import re
import sys

from r2vpo_jax import storage
from r2vpo_jax.errors import UsageError


def of(workdir) -> tuple[int, bool]:
    """(the last iteration with a committed checkpoint or 0, whether the run has finished)."""
    found = storage.sizes(workdir / "checkpoints" / "manifests")
    last = max((int(match[1]) for name in found if (match := re.fullmatch(r"(\d+)\.json", name))), default=0)
    return last, (workdir / "report" / "summary.json").exists()


def main(workdir: str) -> None:
    path = storage.path(workdir, "--workdir")
    storage.check(path, "--workdir")
    last, done = of(path)
    print(last, "done" if done else "going")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (UsageError, OSError) as error:
        sys.exit(f"error: {error}")
