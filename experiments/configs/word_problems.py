"""R2VPO on word problems, two minutes on two CPU cores: a run on text in small.

It takes a small Qwen2 checkpoint that ships with its byte-level BPE tokenizer and chat template, a JSONL data set of
invented problems in the format of GSM8K, and Math-Verify in processes of its own. We chose the settings on the validation
split.
"""

from r2vpo_jax import config


def get_config():
    return config.make(
        model={"path": "word_problems_base"},
        task={
            "name": "text",
            "text": {
                "train": "word_problems?split=train&rows=128:&kind=math",
                "validation": "word_problems?split=train&rows=:128&kind=math",
                "test": "word_problems?split=test&kind=math",
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
