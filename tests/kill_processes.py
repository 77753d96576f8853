"""Kill any one process of a run at random moments, and see that the others end in time and the run goes on. Takes minutes:

    JAX_PLATFORMS=cpu python -m tests.kill_processes --processes=2 --moments=10 --seed=0 --folder=/tmp/kills

A run that nothing happens to is made first. Then, for each moment, a run is begun, one process is killed at a time drawn
evenly from the whole length of the first, the others must end with the line, and the run, given again, must end bit for
bit like the first; to rounding, if --restart says that another number of processes goes on. Prints one line of JSON for
each moment, and ends with exit code 1 if one went wrong. The tests do a few.
"""

import json
import pathlib
import random
import shutil
import signal
import time

from absl import app, flags

from tests.helpers import processes
from tests.helpers.paths import TASK, TINY_BASE
from tests.helpers.records import assert_same_lines

_PROCESSES = flags.DEFINE_integer("processes", 2, "how many")
_MOMENTS = flags.DEFINE_integer("moments", 10, "how many")
_SEED = flags.DEFINE_integer("seed", 0, "of moments and victims")
_RESTART = flags.DEFINE_integer("restart", None, "how many go on (default: as many)")
_SIGNAL = flags.DEFINE_enum("signal", "KILL", ["KILL", "STOP"], "what is sent")
_FOLDER = flags.DEFINE_string("folder", None, "for the runs; emptied first", required=True)

CONFIG = f"""from r2vpo_jax import config


def get_config():
    return config.make(
        model={{"path": "{TINY_BASE}"}},
        sampler={{"group_size": 4}},
        optimizer={{"learning_rate": 1e-3, "warmup_updates": 2}},
        trainer={{"num_iterations": 16, "prompts_per_rollout": 4, "num_minibatches": 2, "num_epochs": 1, "micro_batch_size": 8,
                  "eval_every": 4, "eval_problems": 16, "test_problems": 16, "test_samples": 2, "checkpoint_every": 2}},
        task={{"arithmetic": {TASK}}},
        mesh={{"data": -1}},
    )
"""
LIMIT = 30  # seconds until all have come
SLACK = 10  # seconds: of a machine with few cores


def try_one(
    config_file, folder, whole, count, *, restart: int, moment: float, victim: int, number: signal.Signals
) -> dict:
    """What happened, as JSON values; what should not have raises AssertionError."""
    environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    limit = f"--initialization_timeout_seconds={LIMIT}"
    shutil.rmtree(folder / "run", ignore_errors=True)
    with processes.Processes(config_file, folder / "run", count, limit, **environment) as run:
        time.sleep(moment)
        where = run.output(0).count("waiting for")
        run.send(victim, number)
        others = [i for i in range(count) if i != victim]
        ended = run.ended(*others)
    result = {"moment": round(moment, 2), "victim": victim, "seconds": round(max(e.seconds for e in ended.values()), 1)}
    result |= {"codes": [e.code for e in ended.values()], "line": ended[others[0]].last_line, "waited": where}
    if set(result["codes"]) != {0}:  # else the run was over
        assert set(result["codes"]) == {75}, [e.output[-3000:] for e in ended.values()]
        assert result["seconds"] < max(processes.HEARTBEAT, LIMIT if "waited" in result["line"] else 0) + SLACK, result
        for process in ended.values():
            assert process.last_line.startswith("error: "), process.output[-3000:]
            assert f"process {victim}" in process.last_line or "process 0" in process.last_line, process.last_line
    processes.run(config_file, folder / "run", restart, **environment)
    if restart == count:
        processes.assert_same_outcome(folder / "run", whole)
    else:
        assert_same_lines(folder / "run" / "metrics.jsonl", whole / "metrics.jsonl")
    return result


def main(_):
    folder = pathlib.Path(_FOLDER.value)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config_file = folder / "config.py"
    config_file.write_text(CONFIG)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    processes.run(config_file, folder / "warm", _PROCESSES.value, **environment)
    start = time.monotonic()
    processes.run(config_file, folder / "whole", _PROCESSES.value, **environment)
    length = time.monotonic() - start
    drawn, wrong = random.Random(_SEED.value), 0
    for _ in range(_MOMENTS.value):
        moment, victim = drawn.uniform(0, length), drawn.randrange(_PROCESSES.value)
        try:
            said = try_one(
                config_file,
                folder,
                folder / "whole",
                _PROCESSES.value,
                restart=_RESTART.value or _PROCESSES.value,
                moment=moment,
                victim=victim,
                number=signal.Signals[f"SIG{_SIGNAL.value}"],
            )
        except AssertionError as error:
            wrong += 1
            said = {"moment": round(moment, 2), "victim": victim, "wrong": str(error)[-6000:]}
        print(json.dumps(said), flush=True)
    print(json.dumps({"length": round(length, 1), "moments": _MOMENTS.value, "wrong": wrong}))
    return int(wrong > 0)


if __name__ == "__main__":
    app.run(main)
