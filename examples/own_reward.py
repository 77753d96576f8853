"""A reward function of one's own, and the run that uses it: this file is both, the function and the configuration.

    python -m experiments.train --config=examples/own_reward.py --workdir=runs/own_reward

The policy of the word problems is rewarded for right answers, and a little for short ones. `brevity` is called in the
verifier processes, which load no JAX: what only the configuration needs is imported there.
"""

LONGEST = 56  # tokens


def brevity(questions, responses, answers, response_lengths):
    """1 for nothing at all, 0 for the longest response. (None would say: does not apply to this one.)"""
    return [1 - length / LONGEST for length in response_lengths]


def get_config():
    """Word problems, as experiments/configs/word_problems.py has them, in a few short iterations."""
    from r2vpo_jax import config

    values = config.named("word_problems")
    values.task.reward.function = "examples.own_reward:brevity"
    values.task.reward.function_weight = 0.5
    values.trainer.update(
        num_iterations=8, prompts_per_rollout=16, eval_every=8, eval_problems=32, test_problems=32, test_samples=4
    )
    return values
