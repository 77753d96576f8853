"""Problems without end: the generators of reasoning-gym, by name, with their parameters.

Problem i of a split is the first of 64 candidates of its own whose question falls to that split by its hash: one half
of all questions is for training, a quarter for validation and a quarter for the test. So no question is in two splits,
whatever the seeds and parameters. The gold answer is the recipe of the problem, from which a verifier process makes it
again: {"dataset", "config", "seed", "index"}.
"""

import collections
import collections.abc
import functools
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import types
import typing
from collections.abc import Iterator, Sequence

from r2vpo_jax.data import probe
from r2vpo_jax.data.base import Dataset, Example, InMemoryDataset, same_question
from r2vpo_jax.data.specs import SourceSpec, near, parse_size
from r2vpo_jax.verifiers import procedural

KIND = "reasoning_gym"
_CANDIDATES = 64
_PROBLEMS_A_DATASET = 4  # problems whose candidates come from one seed: some data sets take long to make
_QUARTERS = {"train": (0, 1), "validation": (2,), "test": (3,)}
_LARGEST_SIZE = 100_000
_WIDEST_LEVELS = 12  # a table with a row for each of more values says nothing
_PROBED = 8
_PROBE_SECONDS = 90.0

# Seen with reasoning-gym 0.1.25. What else there is of the kind, `_probe` finds.
_UNORDERED = "its problems depend on the order of sets, so that another process makes others of the same seed"
_NO_ANSWER = "its scorer does not accept the answer that comes with the problem"
_PAYS = "its scorer gives full marks for wrong answers"
_EVALUATES = (
    "its scorer evaluates what a response says as Python: a model may run whatever it writes, with your rights. "
    f"{procedural.ALLOW}=allow in its text lets it, at your risk"
)
REFUSED = {
    "composite": "mixtures are written A?weight=2 + B?weight=1",
    "isomorphic_strings": _UNORDERED,
    "knight_swap": _UNORDERED,
    "list_functions": _UNORDERED,
    "polynomial_multiplication": _UNORDERED,
    "ransom_note": _UNORDERED,
    "word_ladder": _UNORDERED,
    "boxnet": _NO_ANSWER,
    "graph_color": _NO_ANSWER,
    "propositional_logic": _NO_ANSWER,
    "rubiks_cube": _NO_ANSWER,
    "rush_hour": _NO_ANSWER,
    "coin_flip": f"{_PAYS}: '0' for most problems",
    "complex_arithmetic": f"{_PAYS}: 'nan' for all problems",
    "game_of_life_halting": f"{_PAYS}: any text for all problems that do not halt",
    "puzzle24": f"{_PAYS}: any four numbers that make 24, whatever the problem's are",
}


def names() -> list[str]:
    """Generators that can be used. [] where reasoning-gym is not installed."""
    try:
        registry = _registry()
    except ValueError:
        return []
    return sorted(set(registry) - set(REFUSED))


def load(spec: SourceSpec, split: str) -> Dataset:
    """The problems of a generator: without end, or the first `size` different ones.

    Raises:
      ValueError: an unknown or unusable generator, parameters that it does not take, too few different problems.
    """
    if spec.name in REFUSED:
        raise ValueError(f"{spec.text!r}: the generator {spec.name} cannot be used: {REFUSED[spec.name]}")
    registry = _registry()
    if spec.name not in registry:
        raise ValueError(f"{spec.text!r}: there is no generator {spec.name!r}; {near(spec.name, names())}")
    hints = typing.get_type_hints(registry[spec.name][1])
    options = spec.take([*hints, "seed", "size", procedural.ALLOW])
    allowed = options.pop(procedural.ALLOW, None)
    if allowed not in (None, "allow"):
        raise ValueError(f"{spec.text!r}: {procedural.ALLOW}={allowed!r} is unknown; leave it out, or write allow")
    seed = parse_size(spec.text, "seed", options.pop("seed", "0"), 0)
    size = options.pop("size", None)
    size = None if size is None else parse_size(spec.text, "size", size, 1)
    if size is not None and size > _LARGEST_SIZE:
        raise ValueError(f"{spec.text!r}: size={size} is above {_LARGEST_SIZE}; leave it out for problems without end")
    config = {key: _value(spec, key, value, hints[key]) for key, value in options.items()}
    _check_config(spec, registry[spec.name][1], config)
    wrong = _probe(spec.name, json.dumps(config, sort_keys=True))
    if wrong and not (allowed and wrong == _EVALUATES):
        raise ValueError(f"{spec.text!r}: the generator {spec.name} cannot be used: {wrong}")
    endless = Endless(spec.name, config, seed, split, evaluated_answers=bool(allowed))
    return endless if size is None else _first(endless, size, spec.text)


class Endless(Dataset):
    """A generator's problems of one split.

    Args:
      evaluated_answers: whether its scorer may evaluate whatever a response says.
    """

    num_examples = None

    def __init__(self, name: str, config: dict, seed: int, split: str, evaluated_answers: bool = False):
        self.split, self.counts = split, {}
        self._more = {procedural.ALLOW: True} if evaluated_answers else {}
        self._name, self._config, self._seed = name, json.dumps(config, sort_keys=True), seed
        self._example = functools.lru_cache(maxsize=8192)(self._make)

    def example(self, position: int) -> Example:
        if position < 0:
            raise IndexError(f"position {position} of {self.split}")
        return self._example(int(position))

    def examples(self) -> Iterator[Example]:
        return iter(())

    def select(self, keep: Sequence[bool], reason: str) -> "Endless":
        if len(keep):
            raise ValueError(f"{self._name} has no end: nothing to select from")
        return self

    def identity(self) -> Iterator[str]:
        yield from (self._name, self._config, str(self._seed), self.split)
        for position in range(4):  # another version of the package may make others
            yield self.example(position).question

    def _make(self, position: int) -> Example:
        for k in range(_CANDIDATES):
            seed, index = candidate(self._seed, position, k)
            try:
                entry = _dataset(self._name, self._config, seed)[index]
            except Exception as error:
                raise ValueError(
                    f"the generator {self._name} with {self._config} fails at seed {seed}, index {index}: {error!r}"
                ) from error
            question = entry["question"].strip()
            if quarter(question) in _QUARTERS[self.split]:
                gold = {"dataset": self._name, "config": json.loads(self._config), "seed": seed, "index": index}
                gold |= self._more
                return Example(question, entry["answer"], json.dumps(gold), KIND, _level(entry["metadata"]), self._name)
        raise ValueError(
            f"the generator {self._name} with {self._config} has too few different problems: none of {_CANDIDATES} falls "
            f"to {self.split}; widen its parameters"
        )


def candidate(seed: int, position: int, k: int) -> tuple[int, int]:
    """(seed, index) of a data set, for candidate k of the problem at a position.

    Most generators seed themselves with seed + index, which so is 64 * position + k; and stays below 2**32, which is
    all that some take. Positions beyond 2**26, and other `seed`s, start at a place of their own on that circle.
    """
    lap, place = divmod(position, 1 << 26)
    start = 0
    if seed or lap:
        start = int.from_bytes(hashlib.sha256(f"{seed}:{lap}".encode()).digest()[:4], "big")
    block, inner = divmod(place, _PROBLEMS_A_DATASET)
    width = _PROBLEMS_A_DATASET * _CANDIDATES
    return (start - start % width + block * width) % (1 << 32), inner * _CANDIDATES + k


def quarter(question: str) -> int:
    """0 to 3, by the hash of a question."""
    return hashlib.sha256(same_question(question).encode()).digest()[0] % 4


def _registry() -> dict:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(f"generators need reasoning-gym: pip install 'r2vpo_jax[reasoning]' ({error})") from error
    import reasoning_gym  # noqa: F401, registers them

    return DATASETS


@functools.lru_cache(maxsize=64)
def _dataset(name: str, config: str, seed: int):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, **json.loads(config))


def _first(endless: Endless, size: int, text: str) -> InMemoryDataset:
    """The first different problems."""
    chosen: dict[str, Example] = {}
    position = 0
    while len(chosen) < size:
        if position >= 8 * size + 64:
            raise ValueError(
                f"{text!r}: only {len(chosen)} of size={size} problems are different; widen its parameters"
            )
        example = endless.example(position)
        chosen.setdefault(same_question(example.question), example)
        position += 1
    counts = {"generated": position, "duplicates": position - size}
    return InMemoryDataset(list(chosen.values()), endless.split, {name: n for name, n in counts.items() if n})


def _level(metadata: dict) -> str:
    """This problem's values of what its difficulty has a short range for: num_terms=3 num_digits=1."""
    difficulty = metadata.get("difficulty")
    parts = []
    for key, bounds in difficulty.items() if isinstance(difficulty, dict) else ():
        value = metadata.get(key)
        numbers = [n for n in bounds if type(n) in (int, float)] if isinstance(bounds, (list, tuple)) else []
        if type(value) in (int, float) and len(numbers) == 2 and 0 < numbers[1] - numbers[0] <= _WIDEST_LEVELS:
            parts.append(f"{key}={value}")
    text = " ".join(parts)
    return text if len(text) <= 40 else ""


def _value(spec: SourceSpec, key: str, text: str, hint):
    """A parameter as its type wants it."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = {typing.get_origin(choice) or choice for choice in choices}
    if kinds & {str, typing.Literal}:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if kinds & {list, tuple, collections.abc.Sequence}:
        right, wanted = isinstance(value, list), 'a JSON list, such as ["+","-"]'
    elif float in kinds:
        right, wanted = type(value) in (int, float) and math.isfinite(value), "a number"
        value = float(value) if right else value
    elif kinds & {int, bool}:
        right, wanted = type(value) in kinds, "true or false" if bool in kinds else "a whole number"
    else:
        raise ValueError(f"{spec.text!r}: {key} is a {getattr(hint, '__name__', hint)} and cannot be set here")
    if not right:
        raise ValueError(f"{spec.text!r}: {key}={text!r} is not {wanted}")
    return value


def _check_config(spec: SourceSpec, config_type, config: dict) -> None:
    try:
        made = config_type(**config)
        if hasattr(made, "validate"):
            made.validate()
    except Exception as error:  # assertions without a message, and what a value of a wrong kind leads to
        values = {key: getattr(config_type, key, None) for key in typing.get_type_hints(config_type)} | config
        shown = ", ".join(f"{key}={value}" for key, value in values.items() if key not in ("seed", "size"))
        raise ValueError(f"{spec.text!r}: {error or type(error).__name__}; the parameters are {shown}") from error


@functools.lru_cache(maxsize=256)
def _probe(name: str, config: str) -> str:
    """Makes a few problems in another process, and here, and compares; their answers must be accepted there.

    Returns what is wrong: they differ, are not made in time, their answers are not accepted, wrong ones are, or answers are
    evaluated by a scorer that no gate is known for; "" if nothing is.
    """
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    process = subprocess.Popen(
        [sys.executable, "-m", "r2vpo_jax.data.probe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONHASHSEED": other, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    )
    try:
        asked = json.dumps({"dataset": name, "config": json.loads(config), "indices": list(range(_PROBED))})
        out, err = process.communicate(asked.encode(), timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{_PROBED} problems take more than {_PROBE_SECONDS:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        said = err.decode(errors="replace").strip().splitlines()[-1:]
        return f"it fails: {' '.join(said) or f'exit code {process.returncode}'}"
    found = json.loads(out)
    for index, there in enumerate(found["problems"]):
        entry = _dataset(name, config, 0)[index]
        if there["made"] != [entry["question"], entry["answer"]]:
            return _UNORDERED
        if not isinstance(entry["answer"], str) or there["score"] < 1 - 1e-6:
            return f"{_NO_ANSWER} (score {there['score']:g})"
    if paid := _paid(found["problems"]):
        return f"{_PAYS}: {paid}"
    return _EVALUATES if found["evaluates"] and name not in procedural.EVALUATED else ""


def _paid(problems: list[dict]) -> str:
    """The wrong answers that a scorer gives full marks for, in words; "" if there are none.

    One that is right by chance for a problem or two proves nothing, unless it says that there is no answer.
    """
    tried = collections.defaultdict(list)
    for problem in problems:
        for answer, score in problem["wrong"].items():
            what = "the answer of another problem" if answer in problem["others"] else repr(answer)
            tried[what].append(score >= procedural.FULL_SCORE)
    bad = [what for what, paid in tried.items() if sum(paid) >= 2 and 2 * sum(paid) >= len(paid)]
    bad += [repr(answer) for answer in probe.NO_ANSWERS if any(tried[repr(answer)]) and repr(answer) not in bad]
    return ", ".join(f"{what} ({sum(tried[what])} of {len(tried[what])} problems)" for what in bad)
