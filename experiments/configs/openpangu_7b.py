"""R2VPO on openPangu-Embedded-7B, one of the published runs.

As openpangu_1b.py.
"""

from experiments.configs.math_reasoning import math_run


def get_config(choice: str = "r2vpo_on"):
    return math_run(choice, "openPangu-Embedded-7B", responses_at_once=128, prompt={"bos": True})
