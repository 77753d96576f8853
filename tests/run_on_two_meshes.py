"""Four devices that sample and four that learn. Run by training/test_sampler_mesh.py, with eight CPU devices:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.run_on_two_meshes FOLDER

FOLDER gets the runs "turns" and "beside" on two meshes, the latter stopped once, and "one" on a mesh of four devices.
"""

import json
import pathlib
import sys

import jax
import pytest

from r2vpo_jax import config, sharding
from r2vpo_jax.errors import Stopped
from r2vpo_jax.training import sampler_mesh
from r2vpo_jax.training.trainer import train
from tests.helpers.paths import TASK, TINY_BASE

LEARNER = {"data": 1, "fsdp": 2, "tensor": 2}
TWO = {"sampler_devices": 4, "sampler_tensor": 2}


def make_config(mesh, **replay):
    scores = {"eval_problems": 4, "eval_samples": 4, "test_problems": 4, "test_samples": 4}
    sizes = {"prompts_per_rollout": 4, "num_minibatches": 2, "micro_batch_size": 4, "scoring_chunk_size": 5}
    made = config.make(
        objective={"dual": {"budget": 0.01, "step": 0.1}},
        trainer={"num_iterations": 4, "eval_every": 9, "checkpoint_every": 9, **scores, **sizes},
        sampler={"group_size": 4, "weights": "bfloat16"},
        optimizer={"learning_rate": 1e-3, "warmup_updates": 2},
        replay={"lag": 1, **replay},
        task={"arithmetic": TASK},
        evaluation={"batch_size": 64},
        mesh=LEARNER | mesh,
        model={"path": str(TINY_BASE)},
    )
    made.trainer.max_noise_floor = 1e-2
    return config.from_flags(made)


def main():
    folder, said = pathlib.Path(sys.argv[1]), []
    assert jax.device_count() == 8, jax.devices()
    train(make_config(TWO), folder / "turns", say=said.append)
    with pytest.raises(Stopped):
        train(make_config(TWO, overlap=True), folder / "beside", stop_after_iteration=2)
    train(make_config(TWO, overlap=True), folder / "beside")
    with pytest.MonkeyPatch.context() as patch:
        mesh = sharding.make_mesh((1, 2, 2), jax.devices()[:4])
        patch.setattr(sampler_mesh, "make_meshes", lambda _: (mesh, mesh))
        train(make_config({}), folder / "one")
    print(json.dumps(said))


if __name__ == "__main__":
    main()
