"""One of two processes of a run that open a model by its name on the Hub. Run by test_hub_processes.py:

python -m tests.open_on_processes PORT PROCESS_ID WORKDIR
"""

import sys

from r2vpo_jax import cluster
from r2vpo_jax.cluster.place import Place
from r2vpo_jax.config import ModelConfig
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.run import directory


def main():
    port, process_id, workdir = sys.argv[1:]
    cluster.start(Place(f"127.0.0.1:{port}", 2, int(process_id)), {})
    with directory.resolving(workdir):
        base = open_base_model(ModelConfig(path="hf://me/tiny"))
        cluster.agree("base model", base.identity())
        if process_id == "0":
            directory.record_names(workdir, lambda _: None)
    print(base.path.name, flush=True)
    cluster.finish(0)


if __name__ == "__main__":
    main()
