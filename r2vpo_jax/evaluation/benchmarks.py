"""Scores of one model on a list of benchmarks, in files that a killed evaluation continues.

    1. Look at the model (architecture, tokenizer; no weights yet) and at every benchmark's problems.
    2. Claim the output directory: another model, other problems or other settings are refused.
    3. For each batch of problems that outcomes.jsonl does not hold yet: k samples and a greedy one, verified; one line
       a problem is appended.
    4. evaluation.json and evaluation.md, from config.json and outcomes.jsonl and nothing else.

The random key of a draw is a function of (seed, problem, sample, step). Batches begin at the same problems however often
the evaluation was interrupted, so all its files end the same, byte for byte.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
import urllib.parse

import jax
import numpy as np
from jax.experimental import multihost_utils

from r2vpo_jax import sampler, sharding, tasks
from r2vpo_jax.config.evaluation import EvaluationConfig, flag_names, in_flags
from r2vpo_jax.config.fields import require
from r2vpo_jax.config.task import PromptConfig, TaskConfig
from r2vpo_jax.errors import UsageError
from r2vpo_jax.evaluation import model_source
from r2vpo_jax.evaluation import report as benchmark_report
from r2vpo_jax.models.base import BaseModel, open_base_model
from r2vpo_jax.run import console, files, instruments
from r2vpo_jax.run.directory import claim_file
from r2vpo_jax.run.interrupts import any_process, graceful_stop
from r2vpo_jax.sampler import Sampling
from r2vpo_jax.tasks.base import Outcome, Problems, Task

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

    @property
    def num_problems(self) -> int:
        return len(self.levels)

    @property
    def notices(self) -> list[str]:
        return [in_flags(notice) for notice in self.task.notices]

    def identity(self) -> dict:
        return {
            "problems": self.num_problems,
            "digest": self.task.digest,
            "max_prompt_length": self.task.max_prompt_length,
            "max_length": self.task.max_response_length,
            "notices": self.notices,  # they belong beside the scores: what was dropped, what cannot be read
        }


def make_task(spec: str, config: EvaluationConfig, base: BaseModel) -> Task:
    """The embedded task (with its parameters, as in arithmetic?num_digits=1), or a data set."""
    name, _, query = spec.partition("?")
    if name == "arithmetic":
        known = ("min_operands", "max_operands", "num_digits")
        given = urllib.parse.parse_qsl(query, keep_blank_values=True)
        for key, value in given:
            require(
                key in known and value.isdecimal(), f"{spec}: {key}={value} is not one of {', '.join(known)} = number"
            )
        return tasks.make(TaskConfig(**{key: int(value) for key, value in given}), base.tokenizer)
    from r2vpo_jax.tasks.text import TextTask

    room = base.model.config.max_position_embeddings
    prompt_length = config.max_prompt_length or max(min(1024, 3 * room // 4, room - (config.max_length or 0)), 1)
    template = config.template
    if template == "auto":
        template = "chat" if base.tokenizer.chat_template else "plain"
    task_config = TaskConfig(
        name="text",
        train=spec,  # not loaded
        validation=spec,  # not loaded
        test=spec,
        data_dir=config.data_dir,
        max_response_length=config.max_length or max(min(1024, room - prompt_length), 1),
        prompt=PromptConfig(
            template=template,
            text=config.prompt_text,
            system=config.system,
            thinking=config.thinking,
            bos=config.bos,
            max_length=prompt_length,
        ),
        verifier=config.verifier_config(),
    )
    return TextTask(task_config, base.tokenizer, base.eos_ids, splits=(_SPLIT,))


def open_benchmark(spec: str, config: EvaluationConfig, base: BaseModel) -> Benchmark:
    """The problems of a benchmark, looked at before any weights are read.

    Raises:
      ValueError: a data set, prompt or gold answer that cannot work.
      FileNotFoundError: a data set that is not there.
    """
    task = make_task(spec, config, base)
    try:
        room = base.model.config.max_position_embeddings
        needed = task.max_prompt_length + task.max_response_length
        require(
            needed <= room,
            f"{spec}: prompt and response have up to {needed} tokens, but the model has positions for {room}; lower "
            "--max_prompt_length or --max_length",
        )
        vocab_size = base.model.config.vocab_size
        require(
            all(0 <= i < vocab_size for i in task.eos_ids),
            f"end-of-text ids {task.eos_ids}: the model has {vocab_size}",
        )
        available = task.num_problems(_SPLIT)
        size = config.num_problems or available or _OF_ENDLESS
        index = np.arange(size if available is None else min(size, available))
        problems = task.problems(_SPLIT, index)
        longest = -(-int(problems.length.max()) // _PROMPT_COLUMNS) * _PROMPT_COLUMNS
        problems = problems.replace(tokens=problems.tokens[:, -longest:])
        return Benchmark(spec, task, problems, tuple(str(level) for level in task.level(_SPLIT, index)))
    except BaseException:
        task.close()
        raise


# 3. Sampling and judging -----------------------------------------------------------------------------------


_COLUMNS = ("response_tokens", "response_length", "truncated")


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _sample(model, params, tokens, lengths, key, sampling, problem_ids, first_sample, mesh):
    with sharding.activate(mesh):
        return sampler.sample(
            model, params, tokens, lengths, key, sampling, problem_ids=problem_ids, first_sample=first_sample
        )


class Evaluator:
    """Samples and judges batches of problems with one model."""

    def __init__(self, config: EvaluationConfig, base: BaseModel, params, mesh):
        self._config, self._base, self._params, self._mesh = config, base, params, mesh
        self._chief = jax.process_index() == 0

    def rows(self, benchmark: Benchmark, first: int) -> list[dict]:
        """The lines of outcomes.jsonl of the batch of problems that begins at `first`."""
        size = min(self._config.batch_size, benchmark.num_problems)
        positions = np.arange(first, min(first + size, benchmark.num_problems))
        samples = self._judged(benchmark, positions, size, greedy=False)
        greedy = self._judged(benchmark, positions, size, greedy=True) if self._config.greedy else None
        rows = []
        for number, position in enumerate(positions):
            kept = samples["texts"][number][: self._config.texts]
            row = {"task": benchmark.spec, "index": int(position), "level": benchmark.levels[position]}
            row |= {name: samples[name][number] for name in ("outcomes", "lengths", "truncated", "answers")}
            row["greedy"] = None
            if greedy is not None:
                names = {"outcome": "outcomes", "length": "lengths", "truncated": "truncated", "answer": "answers"}
                row["greedy"] = {name: greedy[several][number][0] for name, several in names.items()}
            if kept:
                row |= {"prompt": self._prompt(benchmark, position), "texts": kept}
            reasons = samples["reasons"][number] + (greedy["reasons"][number] if greedy else [])
            row |= {"reason": reasons[0]} if reasons else {}
            rows.append(row)
        return rows

    def _sample(self, problems: Problems, chosen, sampling: Sampling, first: int) -> dict[str, np.ndarray]:
        """Samples `first`, `first` + 1, ... of each of the chosen problems: [N, G, ...] on the host."""
        tokens, length, index = (
            sharding.put_batch(x[chosen], self._mesh) for x in (problems.tokens, problems.length, problems.index)
        )
        key = jax.random.key(self._config.seed)
        rollout = _sample(self._base.model, self._params, tokens, length, key, sampling, index, first, self._mesh)
        shape = len(chosen), sampling.group_size
        found = sharding.to_host({name: getattr(rollout, name) for name in _COLUMNS})
        return {name: x.reshape(*shape, *x.shape[1:]) for name, x in found.items()}

    def _prompt(self, benchmark: Benchmark, position: int) -> str:
        tokens, length = benchmark.problems.tokens[position], benchmark.problems.length[position]
        return benchmark.task.decode(tokens[len(tokens) - length :])

    def _judged(self, benchmark: Benchmark, positions, size: int, *, greedy: bool) -> dict[str, list]:
        """Per problem, lists over its samples. The batch is filled up to `size`, so that one program does all."""
        config, task = self._config, benchmark.task
        count = 1 if greedy else config.k
        chosen = np.resize(positions, size)
        at_once = 1 if greedy else min(config.samples_at_once or count, count)
        parts = []
        for first in range(0, count, at_once):
            sampling = Sampling(
                temperature=0.0 if greedy else config.temperature,
                top_k=0 if greedy else config.top_k,
                top_p=1.0 if greedy else config.top_p,
                group_size=min(at_once, count - first),
                max_response_length=task.max_response_length,
                eos_ids=task.eos_ids,
            )
            parts.append(self._sample(benchmark.problems, chosen, sampling, first))
        columns = (np.concatenate([part[name] for part in parts], axis=1) for name in _COLUMNS)
        responses, lengths, truncated = (x[: len(positions)].reshape(-1, *x.shape[2:]) for x in columns)
        rows = len(lengths)
        index = np.repeat(benchmark.problems.index[positions], count)
        verdicts = task.verify(_SPLIT, index, responses, lengths)
        answers = task.answers(_SPLIT, index, responses, lengths) if self._chief else [None] * rows
        kept = [i % count < config.texts and not greedy for i in range(rows)]
        texts = [task.decode(r[:n]) if keep else "" for r, n, keep in zip(responses, lengths, kept, strict=True)]
        reasons = list(verdicts.reasons) or [""] * rows
        columns = {
            "outcomes": np.asarray(verdicts.outcome).tolist(),
            "lengths": lengths.tolist(),
            "truncated": truncated.tolist(),
            "answers": answers,
            "texts": texts,
        }
        grouped = {name: [x[i : i + count] for i in range(0, rows, count)] for name, x in columns.items()}
        return grouped | {"reasons": [[r for r in reasons[i : i + count] if r] for i in range(0, rows, count)]}


# The file of outcomes --------------------------------------------------------------------------------------


def _read_outcomes(path: pathlib.Path, expected: list[tuple[str, int]]) -> list[dict]:
    """The complete lines there are; a torn last one (a killed process) is cut off.

    Raises:
      ValueError: they are not those of the first `expected` (task, index), in this order.
    """
    files.JsonlWriter(path).close()
    try:
        rows = files.read_jsonl(path)
        found = [(row["task"], row["index"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete its last lines from there on, or the file") from error
    if found != expected[: len(found)]:
        raise ValueError(
            f"{path} does not hold the problems of this evaluation in their order; choose another --output"
        )
    return rows


def _append(path: pathlib.Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def _write_whole(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# The story -------------------------------------------------------------------------------------------------


def run(config: EvaluationConfig, output, *, say=console.say) -> dict | None:
    """Evaluate, or continue to evaluate, into the directory `output`.

    Args:
      config: validated.
      output: gets config.json, outcomes.jsonl, and at the end evaluation.json and evaluation.md.
      say: where lines for people go (process 0 only).

    Returns:
      What evaluation.json holds, or None when it was stopped.

    Raises:
      UsageError: bad input, before weights are read and before anything is overwritten.
    """
    chief = jax.process_index() == 0
    say = say if chief else lambda _: None
    with contextlib.ExitStack() as stack:
        with flag_names():
            mesh = sharding.make_mesh((config.mesh_data, config.mesh_fsdp, config.mesh_tensor))
            source = model_source.find(config.model, config.checkpoint)
            base = open_base_model(config.model_config(source.directory))
            benchmarks = []
            for spec in config.specs:  # 1
                benchmarks.append(open_benchmark(spec, config, base))
                stack.callback(benchmarks[-1].task.close)
            identity = {
                "tasks": {benchmark.spec: benchmark.identity() for benchmark in benchmarks},
                "model": {"name": source.name, "checkpoint": source.iteration, "digest": source.digest()},
                **config.identity(),
            }
            path = claim_file(output, "config.json", identity, write=chief)  # 2
            problems = [(b.spec, i) for b in benchmarks for i in range(b.num_problems)]
            rows = _read_outcomes(path / _OUTCOMES, problems) if chief else []
        for benchmark in benchmarks:
            for notice in benchmark.notices:
                say(f"{benchmark.spec}: {notice}")
        for notice in base.notices:
            say(notice)
        rows = _evaluate_rest(config, source, base, mesh, benchmarks, path / _OUTCOMES, rows, say)  # 3
        if rows is None:
            return None
    if not chief:
        return {}
    summary = benchmark_report.summarize(identity, rows)  # 4
    with _disk_errors(path):
        _write_whole(path / "evaluation.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        _write_whole(path / "evaluation.md", benchmark_report.markdown(summary))
    say("\n" + benchmark_report.markdown(summary))
    say(f"written: {path / 'evaluation.md'}, {path / 'evaluation.json'}")
    return summary


def _evaluate_rest(config, source, base, mesh, benchmarks, file, rows, say) -> list[dict] | None:
    """All rows, once every problem has one; None when it was stopped before."""
    chief, total = jax.process_index() == 0, sum(b.num_problems for b in benchmarks)
    done = len(rows)
    if jax.process_count() > 1:
        done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
    if done == total:
        return rows
    if done:
        say(f"continuing: {done} of {total} problems are done")
    _warn_of_other_code(rows, say)
    with flag_names():
        evaluator = Evaluator(config, base, source.load_params(base, mesh), mesh)
    code, progress = instruments.code_identity(), _Progress(total, done, enabled=chief)
    with graceful_stop() as stop, _disk_errors(file.parent):
        before = 0  # problems of earlier benchmarks
        for benchmark in benchmarks:
            for first in range(0, benchmark.num_problems, config.batch_size):
                last = before + min(first + config.batch_size, benchmark.num_problems)
                if last <= done:
                    continue
                if any_process(stop.requested):
                    say(f"stopped after {done} of {total} problems; the same command goes on from there")
                    return None
                batch = [{**row, "code": code} for row in evaluator.rows(benchmark, first)]
                batch = batch[done - before - first :] if done > before + first else batch  # a kill may have torn it
                if chief:
                    _append(file, batch)
                    rows = rows + batch
                done = last
                progress.update(done, benchmark.spec, rows)
            before += benchmark.num_problems
    return rows


def _warn_of_other_code(rows, say) -> None:
    if any(row["code"] != instruments.code_identity() for row in rows):
        say("warning: the code has changed since this evaluation was started; the rest of it runs the new code")


@contextlib.contextmanager
def _disk_errors(path):
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write to {path} ({error.strerror or error}); what is there is intact: make room, and the same command "
            "goes on from there"
        ) from error


class _Progress:
    """A line a batch on stderr: problems done, running score, time left."""

    def __init__(self, total: int, initial: int, *, enabled: bool):
        self._total, self._initial, self._enabled, self._start = total, initial, enabled, time.perf_counter()

    def update(self, done: int, spec: str, rows: list[dict]) -> None:
        if not self._enabled:
            return
        left = (time.perf_counter() - self._start) / (done - self._initial) * (self._total - done)
        mine = np.array([row["outcomes"] for row in rows if row["task"] == spec])
        score = f"{spec} avg@{mine.shape[1]} {(mine == Outcome.RIGHT).mean():.3f} of {len(mine)}"
        print(f"problem {done}/{self._total}  {score}  {left:.0f} s left", file=sys.stderr, flush=True)
