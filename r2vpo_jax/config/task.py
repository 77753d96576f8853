"""Configuration of a task: which problems, how they are put to the model, how its answers are judged."""

import dataclasses
import datetime
import re

from r2vpo_jax.config.fields import Options, option, require, section


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """From a question to prompt tokens (text tasks)."""

    template: str = option("chat", "chat: the tokenizer's chat template; plain: `text` as it is")
    text: str = option("{question}", "text of the prompt; {question} stands for the problem")
    system: str | None = option(None, "chat: system prompt")
    thinking: bool | None = option(None, "chat: enable_thinking for the template, for templates that know it")
    date: str = option(
        "2024-07-26",
        "chat: YYYY-MM-DD, the day that it is for a template that asks",
        when=lambda s: s.template == "chat",
    )
    bos: bool | None = option(
        None, "whether prompts start with the BOS token (default: as the template or tokenizer does)"
    )
    max_length: int = option(512, "most tokens of a prompt; problems with longer prompts are dropped, and counted")

    def __post_init__(self):
        require(
            self.template in ("chat", "plain"), f"task.prompt.template={self.template!r} is unknown; one of chat, plain"
        )
        require("{question}" in self.text, "task.prompt.text must contain {question}")
        require(self.max_length >= 1, f"task.prompt.max_length must be at least 1, got {self.max_length}")
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError as error:
            raise ValueError(f"task.prompt.date={self.date!r} is not a day, written YYYY-MM-DD") from error
        if self.template == "plain":
            require(
                self.system is None, "task.prompt.system needs task.prompt.template=chat; put it into task.prompt.text"
            )
            require(self.thinking is None, "task.prompt.thinking needs task.prompt.template=chat")


ANSWERS = ("final", "boxed", "answer_tag", "hash", "last_number")  # `verifiers.RESPONSE_STYLES`


@dataclasses.dataclass(frozen=True)
class VerifierConfig:
    """The processes that judge answers (text tasks)."""

    num_workers: int = option(2, "verifier processes")
    time_limit: float = option(5.0, "seconds per response; then the process is killed and the outcome is a timeout")
    max_chars: int = option(200_000, "most characters of a response; a longer one is not judged and counts as an error")
    memory_limit_mb: int = option(2048, "address space of each process, in MiB")
    tolerance: float = option(1e-6, "relative tolerance of numeric answers")
    thinking_marks: tuple[str, ...] = option(
        (),
        "what a thought begins and ends with, for a model whose own marks the tokenizer does not tell (docs/data.md)",
    )
    answer: str = option(
        "final",
        "where the answer of a response is: final (box, tag, ####, the answer is, last number, whichever is first in this "
        "list), or boxed, answer_tag, hash, last_number alone; a response without it is wrong",
    )
    bad_gold: str = option(
        "refuse", "gold answers that do not verify against themselves: refuse the data, or drop and count them"
    )

    def __post_init__(self):
        for name in ("num_workers", "max_chars", "memory_limit_mb"):
            require(getattr(self, name) >= 1, f"task.verifier.{name} must be at least 1, got {getattr(self, name)}")
        require(self.time_limit > 0, f"task.verifier.time_limit must be > 0, got {self.time_limit}")
        require(self.tolerance >= 0, f"task.verifier.tolerance must be >= 0, got {self.tolerance}")
        marks = self.thinking_marks
        object.__setattr__(self, "thinking_marks", tuple(marks))
        require(
            not marks
            or (
                not isinstance(marks, str)
                and len(marks) == 2
                and all(isinstance(m, str) and m for m in marks)
                and marks[0] != marks[1]
            ),
            f"task.verifier.thinking_marks={marks!r} must be two different texts, such as ('<think>', '</think>')",
        )
        require(
            self.answer in ANSWERS,
            f"task.verifier.answer={self.answer!r} is unknown; one of {', '.join(ANSWERS)}",
        )
        require(
            self.bad_gold in ("refuse", "drop"),
            f"task.verifier.bad_gold={self.bad_gold!r} is unknown; one of refuse, drop",
        )


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """reward = correct * [right] + format * [form is kept] + the sum over functions of weight * value.

    The penalty for length is the objective's (`objective.groups.overlong_penalty`): it is no part of the verdict.
    """

    correct: float = option(1.0, "weight of a right answer; 0: the functions alone decide, right above 0.5")
    format: float = option(0.0, "weight of the form, a bonus for a response that keeps it")
    format_pattern: str = option("boxed", "boxed, think_boxed, or a regular expression that the whole response matches")
    function: str | None = option(
        None, "module:function of your own, or several with commas between them (docs/rewards.md has their signatures)"
    )
    function_weight: float = option(1.0, "weight of the function's value", when=lambda s: len(s.functions) < 2)
    function_weights: tuple[float, ...] = option(
        (), "weights of several functions, in their order (default: 1 each)", when=lambda s: len(s.functions) > 1
    )
    function_batch_size: int = option(32, "responses per call of the function")

    def __post_init__(self):
        require(
            self.correct > 0 or self.function is not None,
            "task.reward.correct=0 leaves nothing to learn from; set task.reward.function",
        )
        require(self.correct >= 0, f"task.reward.correct must be >= 0, got {self.correct}")
        require(self.function_batch_size >= 1, "task.reward.function_batch_size must be at least 1")
        paths = [] if self.function is None else [path.strip() for path in self.function.split(",")]
        numbers = all(isinstance(weight, (int, float)) for weight in self.function_weights)
        require(numbers, f"task.reward.function_weights must be numbers, got {self.function_weights}")
        for path in paths:
            require(
                re.fullmatch(r"[\w.]+:[\w.]+", path) is not None,
                f"task.reward.function={self.function!r} must be module:function, or several with commas between them",
            )
        require(len(set(paths)) == len(paths), f"task.reward.function={self.function!r} names a function twice")
        weights = self.function_weights if len(paths) > 1 else ()
        require(
            len(weights) in (0, len(paths)),
            f"task.reward.function_weights has {len(weights)} weights for {len(paths)} functions",
        )
        require(
            self.correct > 0 or any(weight for _, weight in self.functions),
            "task.reward.correct=0 leaves nothing to learn from if every function has the weight 0",
        )
        try:
            re.compile(self.format_pattern)
        except re.error as error:
            raise ValueError(f"task.reward.format_pattern is not a regular expression: {error}") from error

    @property
    def num_parts(self) -> int:
        """Parts that the reward of a text task has in training."""
        return (self.correct > 0) + len(self.functions) + (self.format != 0)

    @property
    def functions(self) -> tuple[tuple[str, float], ...]:
        """(module:function, weight) of each function of the user."""
        if self.function is None:
            return ()
        paths = [path.strip() for path in self.function.split(",")]
        weights = (self.function_weight,) if len(paths) == 1 else self.function_weights or (1.0,) * len(paths)
        return tuple(zip(paths, map(float, weights), strict=True))


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """Sums with written-out working, made and judged in JAX."""

    min_operands: int = option(2, "fewest operands")
    max_operands: int = option(4, "most operands")
    num_digits: int = option(2, "digits of each operand")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where problems are, and how long responses to them may be."""

    data_dir: str | None = option(None, "folder of data sets, on a disk or in a store (gs://bucket/data)")
    max_response_length: int = option(1024, "most tokens of a response")

    def __post_init__(self):
        require(
            self.max_response_length >= 1,
            f"task.text.max_response_length must be at least 1, got {self.max_response_length}",
        )


@dataclasses.dataclass(frozen=True)
class TextConfig(DataConfig):
    """Problems from data sets and generators (docs/data.md)."""

    train: str | None = option(None, "problems to train on, for example dapo_math_17k or gsm8k?split=train&rows=500:")
    validation: str | None = option(None, "problems to validate on")
    test: str | None = option(None, "problems for the base score and the final score only")


# Name -> class. A string, for configurations import no task; `tasks.make` imports the class that is asked for.
TASKS = {
    "arithmetic": "r2vpo_jax.tasks.arithmetic:ArithmeticTask",
    "countdown": "r2vpo_jax.tasks.countdown:CountdownTask",
    "eureka": "r2vpo_jax.tasks.eureka:EurekaTask",
    "text": "r2vpo_jax.tasks.text:TextTask",
}


def is_task(name: str) -> bool:
    """Whether `task.name` may be this: a row of `TASKS`, or module:Class."""
    return name in TASKS or re.fullmatch(r"[\w.]+:\w+", name) is not None


def _is_text(task) -> bool:
    return task.name == "text"


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Problems and verifier."""

    name: str = option(
        "arithmetic",
        "arithmetic, countdown or eureka (embedded), text (data sets and generators), or module:Class for one of your own",
    )
    options: Options = option(
        Options(), "keyword argument of the task's class", when=lambda s: s.name not in ("arithmetic", "text")
    )
    arithmetic: ArithmeticConfig = section(ArithmeticConfig, when=lambda s: s.name == "arithmetic")
    text: TextConfig = section(TextConfig, when=_is_text)
    prompt: PromptConfig = section(PromptConfig, when=_is_text)
    verifier: VerifierConfig = section(VerifierConfig, when=_is_text)
    reward: RewardConfig = section(RewardConfig, when=_is_text)

    def __post_init__(self):
        object.__setattr__(self, "options", Options(self.options))
        require(
            is_task(self.name),
            f"task.name={self.name!r} is unknown; one of {', '.join(TASKS)}, or module:Class",
        )
        require(
            self.name not in ("arithmetic", "text") or not self.options,
            "task.options is for countdown, eureka, or a task of your own, task.name=module:Class",
        )
        if self.name == "text":
            for split in ("train", "validation", "test"):
                require(
                    getattr(self.text, split),
                    f"task.name=text needs task.text.{split}, for example --config.task.text.{split}=gsm8k",
                )
