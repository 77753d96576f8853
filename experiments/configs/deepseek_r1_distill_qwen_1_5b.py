"""R2VPO on DeepSeek-R1-Distill-Qwen-1.5B: the smallest of the published runs.

See math_reasoning.py for what follows the colon, and which numbers
are whose; docs/run_on_math.md has every command.
"""

from experiments.configs.math_reasoning import math_run


def get_config(choice: str = "r2vpo_on"):
    return math_run(choice, "DeepSeek-R1-Distill-Qwen-1.5B")
