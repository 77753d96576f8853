"""R2VPO on word problems in GSM8K's format, minutes on two CPU cores: the way of a real run, in small.

A small Qwen2 checkpoint that ships, its byte-level BPE tokenizer and chat template, a JSONL data set of invented problems,
Math-Verify in processes of its own. Settings were chosen on the validation split.
"""

from r2vpo_jax import config


def get_config():
    return config.make(
        model={"path": "word_problems_base"},
        task={
            "name": "text",
            "text": {
                "train": "gsm8k_fixture?split=train&rows=128:&kind=math",
                "validation": "gsm8k_fixture?split=train&rows=:128&kind=math",
                "test": "gsm8k_fixture?split=test&kind=math",
                "max_response_length": 56,
            },
            "prompt": {"max_length": 48},
        },
        objective={"dual": {"budget": 0.0015, "coef": 2.0, "step": 0.15, "max_step": 0.5}},
        optimizer={"learning_rate": 1e-4, "schedule": "linear", "max_grad_norm": 0.2},
        sampler={"group_size": 8},
        trainer={
            "num_iterations": 30,
            "prompts_per_rollout": 32,
            "num_minibatches": 4,
            "num_epochs": 2,
            "micro_batch_size": 8,
            "eval_every": 10,
            "eval_problems": 128,
            "eval_samples": 2,
            "test_problems": 256,
            "test_samples": 8,
            "checkpoint_every": 10,
        },
    )
