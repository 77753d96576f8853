"""What the tests share: a compilation cache, a tiny decoder, a tiny task and a tiny run.

Compiling costs more than computing here. So shapes are few and the same everywhere, compiled programs are kept on
disk, where the processes that tests start find them, and machine code is not optimized: XLA's own passes run all the
same, only LLVM's do not. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the code that users run.
"""

import functools
import gc
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from r2vpo_jax import advantages, config, sampler, sharding, storage, tasks
from r2vpo_jax.models import base as base_model
from r2vpo_jax.training import trainer

pytest.register_assert_rewrite("tests.helpers")

from tests.helpers import stores  # noqa: E402
from tests.helpers.paths import ROOT, TASK, TINY_BASE  # noqa: E402
from tests.helpers.trees import merged  # noqa: E402

# In the environment too, for the processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
)
jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0")


@pytest.fixture(scope="session")
def task():
    return tasks.ArithmeticTask(**TASK)


@pytest.fixture(scope="module", autouse=True)
def shared_learners():
    """Runs of one file that have the same configuration share a Learner: it holds no state, and compiles anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Learner", functools.cache(trainer.Learner))
        yield


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Compiled programs take memory maps. Linux allows a process 65,530 by default; with none left XLA crashes."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def mesh():
    """One device, however many there are."""
    return sharding.make_mesh((1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A Hugging Face directory with the tests' base model and the task's tokenizer. Copy it before changing it."""
    return shutil.copytree(TINY_BASE, tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_sections(tiny_checkpoint):
    """The arguments of config.make for a run of seconds: 4 iterations of 4 problems x 4 samples, 4 updates each."""
    return {
        "objective": {"dual": {"budget": 0.01, "step": 0.1}},
        "trainer": {
            "num_iterations": 4,
            "prompts_per_rollout": 4,
            "num_minibatches": 2,
            "num_epochs": 2,
            "micro_batch_size": 4,
            "scoring_chunk_size": 5,
            "eval_every": 2,
            "eval_problems": 16,
            "eval_samples": 2,
            "test_problems": 16,
            "test_samples": 16,
            "checkpoint_every": 2,
            "report_every": 0,  # looking at tokens is a program more to compile; training/test_trainer_page.py does
        },
        "sampler": {"group_size": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_updates": 2},
        "task": {"arithmetic": TASK},
        "evaluation": {"batch_size": 256},
        "mesh": {"data": 1},
        "model": {"path": str(tiny_checkpoint)},
    }


@pytest.fixture(scope="session")
def tiny_config(tiny_sections):
    """Makes the frozen Config of that run; `section={field: value}` changes it, at any depth."""

    def make(**overrides):
        return config.from_flags(config.make(**merged(tiny_sections, overrides)))

    return make


@pytest.fixture(scope="session")
def config_file(tiny_sections, tmp_path_factory):
    """A --config file of the tiny run."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    sections = ", ".join(f"{name}={fields!r}" for name, fields in tiny_sections.items())
    path.write_text(f"from r2vpo_jax import config\n\n\ndef get_config():\n    return config.make({sections})\n")
    return path


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """(model, host parameters), read back from the checkpoint as the trainer does."""
    base = base_model.open_base_model(tiny_config().model)
    return base.model, base.load_params()


@pytest.fixture(scope="session")
def rollout(tiny_model, task, mesh):
    """16 verified responses with advantages, on the host, of the shape that the tiny run has."""
    model, params = tiny_model
    problems = task.problems("train", np.arange(4))
    sampling = sampler.Sampling(group_size=4, max_response_length=task.max_response_length, eos_ids=task.eos_ids)
    drawn = sampler.generate(
        model,
        params,
        problems.tokens,
        problems.length,
        jax.random.key(3),
        sampling,
        mesh=mesh,
        problem_ids=problems.index,
    )
    reward, outcome, *_ = task.verify("train", np.repeat(np.arange(4), 4), drawn.response_tokens, drawn.response_length)
    drawn = drawn.replace(reward=reward, outcome=outcome, advantage=np.asarray(advantages.group_relative(reward, 4)))
    assert len(set(drawn.prompt_length)) > 1, "ragged prompts are wanted"
    assert len(set(drawn.response_length)) > 1, "ragged responses are wanted"
    assert np.any(drawn.advantage != 0), "rewards that differ are wanted"
    return drawn


@pytest.fixture(scope="session")
def bucket():
    """gs://BUCKET of a store that runs here."""
    with stores.bucket() as address:
        yield address


@pytest.fixture
def store(bucket, tmp_path):
    """A folder in that store, of this test alone."""
    return storage.path(f"{bucket}/{tmp_path.parent.name}/{tmp_path.name}")
