"""Scores of one model on a list of benchmarks, in files that a killed evaluation continues.

    1. Look at the model (architecture, tokenizer; no weights yet) and at every benchmark's problems.
    2. Claim the output directory: another model, other problems or other settings are refused.
    3. For each batch of problems that outcomes.jsonl does not hold yet: k samples and a greedy one, verified; one line
       for each problem is appended.
    4. evaluation.json and evaluation.md, from config.json and outcomes.jsonl and nothing else.

The random key of a draw is a function of (seed, problem, sample, step). Batches begin at the same problems however often
the evaluation was interrupted, so all its files end the same, byte for byte.
"""

import contextlib
import dataclasses
import functools
import json

import jax
import numpy as np
from jax.experimental import multihost_utils

from r2vpo_jax import cluster, sharding, tasks
from r2vpo_jax.config.evaluation import EvaluationConfig, identity
from r2vpo_jax.config.flags import leaves
from r2vpo_jax.errors import Stopped, usage_errors
from r2vpo_jax.evaluation import model_source, settings, subsets
from r2vpo_jax.evaluation import report as benchmark_report
from r2vpo_jax.evaluation.draws import Outcomes, draw
from r2vpo_jax.models import attention
from r2vpo_jax.models.base import BaseModel, open_base_model
from r2vpo_jax.models.identity import digest
from r2vpo_jax.run import console, files, instruments
from r2vpo_jax.run.directory import claim_file, folder, lock, record_names, resolving
from r2vpo_jax.run.interrupts import any_process, graceful_stop
from r2vpo_jax.sampler import Sampling
from r2vpo_jax.tasks.base import Outcome, Problems, Task, stop_of
from r2vpo_jax.verifiers.outcome import unjudged

_SPLIT = "test"
_OUTCOMES = "outcomes.jsonl"
_OF_ENDLESS = 256  # problems of a source without an end
_PROMPT_COLUMNS = 32  # prompts are padded to a multiple of this


# 1. The benchmarks -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The problems of one name in --tasks."""

    spec: str
    task: Task
    problems: Problems  # all that are evaluated
    levels: tuple[str, ...]  # of each
    notices: tuple[str, ...]  # what a reader of its scores should know

    @property
    def num_problems(self) -> int:
        return len(self.levels)

    @property
    def index(self) -> list[int]:
        """Their positions in the split."""
        return self.problems.index.tolist()

    def identity(self) -> dict:
        return {
            "problems": self.num_problems,
            "digest": self.task.digest,
            "max_prompt_length": self.task.max_prompt_length,
            "max_response_length": self.task.max_response_length,
            "notices": list(self.notices),  # beside the scores: what was dropped, what cannot be read
        }

    def prompt(self, position: int) -> str:
        """A prompt as the model sees it."""
        tokens, length = self.problems.tokens[position], self.problems.length[position]
        return self.task.decode(tokens[len(tokens) - length :])


def open_benchmark(spec: str, config: EvaluationConfig, base: BaseModel) -> Benchmark:
    """The problems of a benchmark, looked at before any weights are read.

    Raises:
      ValueError: a task, data set, prompt or gold answer that cannot work.
      FileNotFoundError: a data set that is not there.
    """
    task = tasks.make(
        config.task_config(spec), base.tokenizer, base.eos_ids, splits=(_SPLIT,), stop=config.sampler.stop
    )
    try:
        base.check_length(task.max_prompt_length + task.max_response_length)
        available = task.num_problems(_SPLIT)
        size = config.num_problems or available or _OF_ENDLESS
        index = subsets.choose(task, _SPLIT, size)
        problems = task.problems(_SPLIT, index)
        longest = -(-int(problems.length.max()) // _PROMPT_COLUMNS) * _PROMPT_COLUMNS
        problems = problems.replace(tokens=problems.tokens[:, -longest:])
        levels = tuple(str(level) for level in task.level(_SPLIT, index))
        return Benchmark(spec, task, problems, levels, (*task.notices, *subsets.notices(task, _SPLIT, size)))
    except BaseException:
        task.close()
        raise


# 3. Sampling and judging -----------------------------------------------------------------------------------


class Evaluator:
    """Samples and judges batches of problems with one model."""

    def __init__(self, config: EvaluationConfig, base: BaseModel, params, mesh):
        self._config, self._base, self._params, self._mesh = config, base, params, mesh

    def rows(self, benchmark: Benchmark, first: int) -> list[dict]:
        """The lines of outcomes.jsonl of the batch of problems that begins at `first`."""
        config, task = self._config, benchmark.task
        positions = np.arange(first, min(first + config.problems_at_once, benchmark.num_problems))
        sampling = config.evaluation
        drawn = self._draw(benchmark, positions, config.k, sampling.temperature, sampling.top_p, sampling.top_k)
        greedy = self._draw(benchmark, positions, 1, temperature=0.0) if config.greedy else None
        rows = []
        for number, position in enumerate(positions):
            row = {
                "task": benchmark.spec,
                "index": int(benchmark.problems.index[position]),
                "level": benchmark.levels[position],
            }
            row |= {name: columns[number] for name, columns in _columns(drawn).items()}
            row["greedy"] = None
            if greedy is not None:
                one = {"outcomes": "outcome", "lengths": "length", "truncated": "truncated", "answers": "answer"}
                row["greedy"] = {one[name]: columns[number][0] for name, columns in _columns(greedy).items()}
            if texts := [drawn.text(task, number, i) for i in range(min(config.texts, config.k))]:
                row |= {"prompt": benchmark.prompt(position), "texts": texts}
            reasons = [r for each in (drawn, greedy) if each is not None for r in each.reasons[number] if r]
            row |= {"reason": reasons[0]} if reasons else {}
            rows.append(row)
        return rows

    def _draw(self, benchmark: Benchmark, positions, k: int, temperature: float, top_p=1.0, top_k=0) -> Outcomes:
        sampling = Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            group_size=k,
            max_response_length=benchmark.task.max_response_length,
            eos_ids=benchmark.task.eos_ids,
            stop=stop_of(benchmark.task),
        )
        size = self._config.problems_at_once
        return draw(
            self._base.model,
            self._params,
            benchmark.task,
            _SPLIT,
            jax.tree.map(lambda x: x[positions], benchmark.problems),
            sampling,
            jax.random.key(self._config.seed),
            mesh=self._mesh,
            batch_size=min(size * k, self._config.evaluation.batch_size),
            segment_length=self._config.evaluation.segment_length,
            fill_to=min(size, benchmark.num_problems),
            answers=jax.process_index() == 0,
        )


def _columns(drawn: Outcomes) -> dict[str, list]:
    """Per problem, lists over its samples."""
    arrays = {name: getattr(drawn, name).tolist() for name in ("outcomes", "lengths", "truncated")}
    return arrays | {"answers": drawn.answers}


# The file of outcomes --------------------------------------------------------------------------------------


def _read_outcomes(path, expected: list[tuple[str, int]]) -> list[dict]:
    """The complete lines there are; a torn last one (a killed process) is cut off.

    Raises:
      ValueError: they are not those of the first `expected` (task, index), in this order.
    """
    files.JsonlWriter(path).close()
    try:
        rows = files.read_jsonl(path)
        found = [(row["task"], row["index"]) for row in rows]
    except FileNotFoundError:
        return []  # a store holds no empty line file
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete its last lines from there on, or the file") from error
    if found != expected[: len(found)]:
        raise ValueError(
            f"{path} does not hold the problems of this evaluation in their order; choose another --output"
        )
    return rows


# The course of an evaluation -------------------------------------------------------------------------------------------------


def run(config: EvaluationConfig, output, *, say=console.say) -> dict:
    """Evaluate, or continue to evaluate, into the directory `output`.

    Args:
      config: from `settings.resolve`.
      output: gets config.json, outcomes.jsonl, and at the end evaluation.json and evaluation.md.
      say: where lines for people go (process 0 only).

    Returns:
      What evaluation.json holds; on processes other than 0, which write nothing, {}.

    Raises:
      Stopped: the evaluation was stopped before its end; what was drawn is kept.
      UsageError: bad input, or a directory that is in use, before weights are read and before anything is overwritten.
    """
    chief = jax.process_index() == 0
    say = say if chief else lambda _: None
    folder(output, "--output")
    with contextlib.ExitStack() as stack:
        with usage_errors():
            stack.enter_context(resolving(output, config.model.path))
            mesh = sharding.make_mesh((config.mesh.data, config.mesh.fsdp, config.mesh.tensor))
            source = model_source.find(config.model.path, config.checkpoint)
            base = open_base_model(config.model_config(source.directory, source.lora))
            attention.check(base.model.config, mesh.devices.flat[0])
            benchmarks = []
            for spec in config.tasks:  # 1
                benchmarks.append(open_benchmark(spec, config, base))
                stack.callback(benchmarks[-1].task.close)
            evaluated = _evaluated(config, source, base, benchmarks)
            cluster.agree("evaluation", dict(leaves(evaluated)))
            claim = functools.partial(claim_file, output, "config.json", evaluated, flag="--output")
            path = claim(write=False)  # 2
            with files.disk_errors(f"--output={path}"):
                cluster.agree_on_folder(path, flag="--output")
            if chief:
                stack.enter_context(lock(output, say=say, flag="--output"))
                claim()
                record_names(path, say)
            problems = [(b.spec, i) for b in benchmarks for i in b.index]
            rows = _read_outcomes(path / _OUTCOMES, problems) if chief else []
        if source.run and (differs := settings.differences(config, source.run)):
            say(f"differs from the run: {'; '.join(differs)}")
        for notice in (*(f"{b.spec}: {notice}" for b in benchmarks for notice in b.notices), *base.notices):
            say(notice)
        with files.disk_errors(path, "what is there"):
            rows = _evaluate_rest(config, source, base, mesh, benchmarks, path / _OUTCOMES, rows, say)  # 3
    if not chief:
        return {}
    summary = benchmark_report.summarize(evaluated, rows)  # 4
    for benchmark in benchmarks:
        if line := _without_verdicts([row for row in rows if row["task"] == benchmark.spec]):
            say(f"warning: {benchmark.spec}: {line}")
    with files.disk_errors(path, "what is there"):
        files.write_atomically(path / "evaluation.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        files.write_atomically(path / "evaluation.md", benchmark_report.markdown(summary))
    say("\n" + benchmark_report.markdown(summary))
    say(f"written: {path / 'evaluation.md'}, {path / 'evaluation.json'}")
    return summary


def _evaluated(
    config: EvaluationConfig, source: model_source.ModelSource, base: BaseModel, benchmarks: list[Benchmark]
) -> dict:
    """What config.json holds: the settings that scores depend on, and the identity of problems and weights."""
    values = identity(config)
    values["tasks"] = {benchmark.spec: benchmark.identity() for benchmark in benchmarks}
    values["checkpoint"] = source.iteration
    values["model"]["digest"] = digest(source.identity(base))
    return values


def _evaluate_rest(config, source, base, mesh, benchmarks, file, rows, say) -> list[dict]:
    """All rows, once every problem has one."""
    chief, total = jax.process_index() == 0, sum(b.num_problems for b in benchmarks)
    done = len(rows)
    if jax.process_count() > 1:
        done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
    if done == total:
        return rows
    code = instruments.code_identity()
    if done:
        say(f"continuing: {done} of {total} problems are done")
    if any(row["code"] != code for row in rows):
        say(instruments.CODE_CHANGED.format("evaluation"))
    with usage_errors():
        evaluator = Evaluator(config, base, source.load_params(base, mesh), mesh)
    size, before = config.problems_at_once, 0  # problems of earlier benchmarks
    with graceful_stop() as stop:
        bar = console.ProgressBar(total, done, enabled=chief, every=1, unit="problem")
        for benchmark in benchmarks:
            for first in range(0, benchmark.num_problems, size):
                last = before + min(first + size, benchmark.num_problems)
                if last <= done:
                    continue
                if any_process(stop.requested):
                    raise Stopped(f"stopped after {done} of {total} problems; the same command goes on from there")
                batch = [{**row, "code": code} for row in evaluator.rows(benchmark, first)]
                batch = batch[max(done - before - first, 0) :]  # a kill may have torn it
                if chief:
                    files.append_lines(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in batch))
                    rows = rows + batch
                done = last
                bar.update(done, _running_score(benchmark.spec, rows) if chief else "")
            before += benchmark.num_problems
        bar.close()
    return rows


def _without_verdicts(rows: list[dict]) -> str:
    """A line that says so if most samples of a benchmark have no verdict; else ""."""
    none = unjudged(np.array([row["outcomes"] for row in rows]))
    if 2 * none.sum() <= none.size:
        return ""
    reason = next((row["reason"] for row in rows if "reason" in row), "the task gives no reason")
    return f"{none.sum()} of {none.size} samples have no verdict, and count as not right; the first reason: {reason}"


def _running_score(spec: str, rows: list[dict]) -> str:
    outcomes = np.array([row["outcomes"] for row in rows if row["task"] == spec])
    return f"{spec} pass@1 {(outcomes == Outcome.RIGHT).mean():.3f} of {len(outcomes)}"
