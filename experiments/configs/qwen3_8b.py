"""R2VPO on Qwen3-8B, with thinking.

See math_reasoning.py for what follows the colon, and which numbers are whose.
"""

from experiments.configs.math_reasoning import math_run


def get_config(choice: str = "r2vpo_on"):
    return math_run(choice, "Qwen3-8B", responses_at_once=128, prompt={"thinking": True})
