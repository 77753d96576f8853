"""Questions to prompt tokens: chat template or plain text, system prompt, thinking, BOS."""

import numpy as np

from r2vpo_jax.config.task import PromptConfig


class PromptTemplate:
    """Renders questions with a tokenizer; checked when it is made.

    Raises:
      ValueError: a chat template is asked for and the tokenizer has none, the template refuses the messages or
        ignores `thinking`, or BOS is asked for and there is none.
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
        self.tokens("?")

    def text(self, question: str) -> str:
        """The prompt as text, without what the tokenizer itself adds."""
        if self._config.template == "plain":
            return self._user_text(question)
        return self._chat(question, thinking=self._config.thinking)

    def tokens(self, question: str) -> np.ndarray:
        """int32 [prompt tokens], at least one."""
        # A chat template writes special tokens itself; plain text gets those that the tokenizer adds.
        plain = self._config.template == "plain"
        ids = self._tokenizer(self.text(question), add_special_tokens=plain, verbose=False)["input_ids"]
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
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switches)
        except Exception as error:  # a template is a program of the checkpoint's, in Jinja's sandbox
            raise ValueError(
                f"the tokenizer's chat template refuses the prompt: {error or type(error).__name__}"
            ) from error


def unknown_share(tokenizer, token_rows) -> float:
    """Share of prompt tokens that are the tokenizer's "unknown": high if it does not know the language at all."""
    unknown = tokenizer.unk_token_id
    rows = [np.asarray(row) for row in token_rows]
    if unknown is None or not rows:
        return 0.0
    return float(np.mean(np.concatenate(rows) == unknown))
