"""Questions to prompt tokens: chat template or plain text, system prompt, thinking, BOS, the day that it is."""

import numpy as np

from r2vpo_jax.config.task import PromptConfig
from r2vpo_jax.models import chat


class PromptTemplate:
    """Renders questions with a tokenizer; checked when it is made.

    Raises:
      ValueError: a chat template is asked for and the tokenizer has none, the template refuses the messages or
        ignores `thinking`, leaves the question or `system` out or gives another prompt each time, or BOS is asked for and
        there is none.
    """

    def __init__(self, config: PromptConfig, tokenizer):
        self._config, self._tokenizer = config, tokenizer
        if config.template == "chat" and not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; set task.prompt.template=plain and put the question's frame into "
                "task.prompt.text"
            )
        if config.bos and tokenizer.bos_token_id is None:
            raise ValueError("task.prompt.bos=True, but the tokenizer names no BOS token (bos_token in its config)")
        if config.thinking is not None and self._chat("?", thinking=True) == self._chat("?", thinking=False):
            raise ValueError("task.prompt.thinking is set, but the tokenizer's chat template takes no notice of it")
        if self.text("?") != self.text("?"):
            raise ValueError(
                "the tokenizer's chat template gives another prompt each time (it draws random numbers); mend it, or set "
                "task.prompt.template=plain"
            )
        # Templates of models that also see write nothing where a message is plain text and not a list of parts.
        if self.text("1") == self.text("2"):
            raise ValueError(
                "the tokenizer's chat template leaves the question out (it may want messages of another form than a role and a "
                "text); mend it, or set task.prompt.template=plain"
            )
        if config.template == "chat" and (config.system or "").strip() not in self.text("?"):
            raise ValueError("task.prompt.system is set, but the tokenizer's chat template leaves it out")
        # A chat template writes special tokens itself; plain text gets those that the tokenizer puts in front of it.
        self._first = _put_before(tokenizer) if config.template == "plain" else []
        self.tokens("?")

    def text(self, question: str) -> str:
        """The prompt as text, without what the tokenizer itself adds."""
        if self._config.template == "plain":
            return self._user_text(question)
        return self._chat(question, thinking=self._config.thinking)

    def tokens(self, question: str) -> np.ndarray:
        """int32 [prompt tokens], at least one."""
        ids = self._tokenizer(self.text(question), add_special_tokens=False, verbose=False)["input_ids"]
        ids = [*self._first, *ids]
        bos = self._tokenizer.bos_token_id
        if self._config.bos is not None and bos is not None:
            while ids and ids[0] == bos:
                ids = ids[1:]
            ids = [bos, *ids] if self._config.bos else ids
        if not ids:
            raise ValueError("a prompt has no tokens; see task.prompt.text")
        return np.asarray(ids, np.int32)

    def _user_text(self, question: str) -> str:
        return self._config.text.replace("{question}", question)

    def _chat(self, question: str, thinking: bool | None) -> str:
        messages = [{"role": "user", "content": self._user_text(question)}]
        if self._config.system is not None:
            messages.insert(0, {"role": "system", "content": self._config.system})
        switches = {} if thinking is None else {"enable_thinking": thinking}
        return chat.render(self._tokenizer, messages, date=self._config.date, add_generation_prompt=True, **switches)


def _put_before(tokenizer) -> list[int]:
    """The ids that a tokenizer puts in front of plain text. What it puts behind ends a text, and a prompt has no end."""
    text, bare = (tokenizer("?", add_special_tokens=added, verbose=False)["input_ids"] for added in (True, False))
    starts = [i for i in range(len(text) - len(bare) + 1) if text[i : i + len(bare)] == bare]
    return text[: starts[0]] if starts else []


def unknown_share(tokenizer, token_rows) -> float:
    """Share of prompt tokens that are the tokenizer's "unknown": high if it does not know the language at all."""
    unknown, found, total = tokenizer.unk_token_id, 0, 0
    for row in token_rows:
        found, total = found + int(np.sum(np.asarray(row) == unknown)), total + len(row)
    return found / total if total and unknown is not None else 0.0
