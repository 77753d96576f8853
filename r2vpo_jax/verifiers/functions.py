"""How a reward function of the user is called, and what it may return. Runs in verifier processes; imports next to nothing.

There are two kinds of signature, told apart by the names of the parameters:

    f(questions, responses, answers, level, **columns)          three texts by position, everything else by name
    f(prompts, completions, completion_ids=None, **columns)     everything by name, as Transformers' TRL calls it

A function with a parameter `completions`, or without three positional parameters, is called by name. Each argument is a list
with an element for each response.
"""

import inspect
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

OURS = ("questions", "responses", "answers")
# Names that a function may ask for besides columns of the data; these win over columns of the same name.
KNOWN = (
    *OURS,
    "prompts",  # the prompt as the model sees it
    "completions",  # the same as responses
    "completion_ids",  # token ids of the responses
    "levels",  # as the data state them
    "sources",  # names of the data sets
    "prompt_lengths",  # tokens
    "response_lengths",  # tokens
)
_TRL = ("prompts", "completions", "completion_ids")  # what TRL gives a function with **keywords, besides columns


class Parameters(NamedTuple):
    """What a function wants."""

    by_name: bool  # whether the three texts are among `required` and `optional`, or go by position
    required: tuple[str, ...]
    optional: tuple[str, ...]
    every_column: bool  # **keywords

    def names(self) -> set[str]:
        """Arguments that are given by name if they are there, but for the columns that **keywords takes."""
        return {*self.required, *self.optional, *(_TRL if self.by_name and self.every_column else ())}


def parameters(function: Callable) -> Parameters:
    """Read from the signature. A function without one (a builtin) gets the three texts by position."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return Parameters(False, (), (), False)
    positional = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = any(p.kind == p.VAR_POSITIONAL for p in found)
    by_name = any(p.name == "completions" for p in found) or not (len(positional) >= len(OURS) or rest)
    taken = () if by_name else {p.name for p in positional[: len(OURS)]}
    named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in taken]
    return Parameters(
        by_name,
        tuple(p.name for p in named if p.default is p.empty),
        tuple(p.name for p in named if p.default is not p.empty),
        any(p.kind == p.VAR_KEYWORD for p in found),
    )


def call(function: Callable, texts: list[list[str]], named: dict[str, list]) -> list[Any]:
    """The values of a function for n responses.

    Args:
      function: of the user.
      texts: questions, responses and answers, given by position; [] if the function takes all by name.
      named: what is given by name.

    Returns:
      For each response a float, None (the function does not apply to it), or {"error": why it has no value}.

    Raises:
      TypeError, ValueError: what was returned is no list of n values.
    """
    size = len((texts or list(named.values()))[0])
    result = function(*texts, **named)
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError("the function returned a coroutine; an async function is not awaited, make it a plain one")
    wanted = f"a list of one number for each of the {size} responses is needed"
    shape = getattr(result, "shape", None)
    if shape is not None and tuple(shape) != (size,):
        raise ValueError(f"the function returned an array of shape {tuple(shape)}; {wanted}")
    if isinstance(result, (str, bytes, dict, set)) or not hasattr(result, "__iter__"):
        what = "nothing" if result is None else f"a value of type {type(result).__name__}"
        raise TypeError(f"the function returned {what}; {wanted}")
    values = list(result)
    if len(values) != size:
        raise ValueError(f"the function returned {len(values)} values for {size} responses")
    return [_value(value) for value in values]


def _value(value):
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or getattr(value, "shape", ()) != () or not hasattr(value, "__float__"):
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else f" {value!r:.40}"
        return {"error": f"the value is no number but a {type(value).__name__}{shape}"}
    try:
        number = float(value)
        if math.isnan(number):
            return None
        finite = math.isfinite(struct.unpack("f", struct.pack("f", number))[0])
    except OverflowError:
        finite = False
    return number if finite else {"error": f"the value is not a finite float32: {value!r:.40}"}
