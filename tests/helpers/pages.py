"""Lines of a run that pages are made of."""


def iteration(number, *, reward=0.5):
    """Of metrics.jsonl: 6 s, of which the first iteration takes 60; the loop began after 20 s."""
    compiled = 54.0 if number == 1 else 0.0
    return {
        "kind": "train", "iteration": number, "version": 4 * number, "rollouts": 16 * number, "rollout_tokens": 160 * number,
        "reward/mean": reward, "outcome/judged": 1.0, "response/length": 10.0, "response/length_max": 14, "response/truncated": 0.0,
        "policy/entropy": 0.5, "ratio/variance": 0.001 * number, "ratio/max": 1.5, "dual/signal": 0.002 * number,
        "dual/variance_coef": 0.1 * number, "optimizer/grad_norm": 1.0, "clip/gradient_share": 0.01, "keeps/at_stake": "nan",
        "throughput/rollout_tokens_per_second": 12_345.0, "throughput/update_tokens_per_second": 2345.0,
        "time/rollout": 3.0, "time/verify": 0.5, "time/score": 0.25, "time/update": 2.0, "time/compile": compiled,
        "time/iteration": 6.0 + compiled, "time/run": 74.0 + 6.0 * number,
    }  # fmt: skip


def validation(number, score):
    """Of metrics.jsonl."""
    return {
        "kind": "evaluation",
        "split": "validation",
        "iteration": number,
        "rollouts": 16 * number,
        "pass_at_1": score,
    }


def sample(number, *, told):
    """Of samples.jsonl; with what was done to each token, if it is told."""
    row = {
        "iteration": number, "version": 0, "problem": 7, "prompt": "1+2=", "response": "3;4", "reward": 1.0, "outcome": "right",
        "advantage": 0.5,
    }  # fmt: skip
    tokens = {"token_texts": ["3", ";", "4"], "log_ratios": [0.3, -0.2, 0.0], "kept": [0.0, 0.6, 1.0]}
    return row | ({"age": 4, "learned": True, **tokens} if told else {})
