"""Chat templates: programs of a model directory that write messages as one text."""

import datetime

# What Llama 3's templates say themselves where they are given no clock.
DATE = "2024-07-26"

_DIRECTIVES = (
    "-d", "-m", "-H", "-I", "-M", "-S", "-j", "a", "A", "w", "u", "d", "e", "b", "B", "h", "m", "y", "Y", "C", "G", "V", "U",
    "W", "H", "I", "p", "M", "S", "f", "j", "c", "x", "X", "D", "F", "R", "T", "s", "z", "Z",
)  # fmt: skip


def render(tokenizer, messages: list[dict], *, date: str = DATE, **switches) -> str:
    """The text of messages.

    Args:
      tokenizer: a Transformers tokenizer with a chat template.
      messages: {"role", "content"} of each.
      date: YYYY-MM-DD, the day that it is for a template that asks for the time.
      switches: of `apply_chat_template`, and of the template itself.

    Raises:
      ValueError: the template refuses the messages.
    """
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _clock(date) + template
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **switches)
    except Exception as error:  # a template is a program of the checkpoint's, in Jinja's sandbox
        raise ValueError(
            f"the tokenizer's chat template refuses the prompt: {error or type(error).__name__}"
        ) from error


def end_of_turn(tokenizer) -> int | None:
    """The id that the chat template writes after an answer, if that is a token of its own; None: there is none.

    Only added tokens count: a template may as well end a turn by words or by a new line, which are part of any text.
    """
    if not tokenizer.chat_template:
        return None
    answer = "The answer is seven."
    messages = [{"role": "user", "content": "2+5?"}, {"role": "assistant", "content": answer}]
    try:
        _, found, rest = render(tokenizer, messages).rpartition(answer)
    except ValueError:  # it writes no answers: then it names no end of them. That it writes questions is seen later.
        return None
    ids = tokenizer(rest.lstrip(), add_special_tokens=False, verbose=False)["input_ids"] if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _clock(date: str) -> str:
    """Jinja that gives `strftime_now`, the one clock of templates, a day that does not change: midnight of `date`.

    It is a macro because Transformers lets nothing but plain data into a template. The empty text behind it keeps a line break
    that the template may begin with.
    """
    day = datetime.datetime.fromisoformat(date)
    replaced = "".join(f"|replace({'%' + d!r}, {day.strftime('%' + d)!r})" for d in _DIRECTIVES)
    return "{% macro strftime_now(format) %}{{ format" + replaced + "|replace('%%', '%') }}{% endmacro %}{{ '' }}"
