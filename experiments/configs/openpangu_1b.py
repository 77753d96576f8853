"""R2VPO on openPangu-Embedded-1B, one of the published runs.

Its tokenizer is code of its own, which is never run: put a tokenizer.json into the directory (docs/run_on_math.md). Its
prompts start with BOS, which the chat template does not write.
"""

from experiments.configs.math_reasoning import math_run


def get_config(choice: str = "r2vpo_on"):
    return math_run(choice, "openPangu-Embedded-1B", prompt={"bos": True})
