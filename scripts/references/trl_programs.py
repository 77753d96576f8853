"""The programs of a workload with TRL's GRPOTrainer; benchmark.py starts it in TRL's environment.

    python trl_programs.py WORKLOAD.json WEIGHTS

A rollout is the trainer's own generation with Transformers (it has others, with an engine), without the scores that it
takes afterwards. An update is its loss (metrics included) on micro-batches, its backward pass, clip and optimizer.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks import workloads
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch_programs import DEVICE, Programs, main, synchronize
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer


class TrlPrograms(Programs):
    def _rollout(self):
        trainer = self.trainer()
        eos_ids = list(self.workload.eos_ids)
        trainer.generation_config.eos_token_id = eos_ids or None
        trainer.eos_token_ids = eos_ids or [-1]

        def generate(rows):
            return trainer._generate_single_turn(rows, None, {}, self.workload.group_size)[0]

        return lambda: workloads.rollout_facts(self.workload, generate), {}

    def _update(self):
        trainer, batches = self.trainer(), self.batches()
        prompt = self.workload.prompt_size
        model = trainer.accelerator.prepare(trainer.model).train()
        optimizer = trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = len(batches)
        inputs = [
            {
                "prompt_ids": batch["tokens"][:, :prompt],
                "prompt_mask": batch["attention"][:, :prompt],
                "completion_ids": batch["tokens"][:, prompt:],
                "completion_mask": batch["mask"],
                "advantages": batch["advantage"][:, 0],
                "old_per_token_logps": batch["old_logp"],
                "num_items_in_batch": sum(batch["mask"].sum() for batch in batches),
            }
            for batch in batches
        ]

        def step():
            for batch in inputs:
                trainer.accelerator.backward(trainer.compute_loss(model, batch))
            trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            synchronize()

        return step, workloads.update_facts(self.workload)

    def trainer(self):
        """A GRPOTrainer of the workload's model; its data set and tokenizer are not used."""
        work = self.workload
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"end": 0, "x": 1}, unk_token="x")), eos_token="end", pad_token="end"
        )
        accumulated = work.update_rows // work.micro_batch_size
        settings = GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=work.micro_batch_size,
            gradient_accumulation_steps=accumulated,
            steps_per_generation=accumulated,
            num_generations=workloads.GROUP if work.micro_batch_size % workloads.GROUP == 0 else 2,
            max_completion_length=work.response_size,
            temperature=1.0,
            beta=0.0,
            learning_rate=1e-6,
            max_grad_norm=1.0,
            bf16=work.compute_dtype == "bfloat16",
            gradient_checkpointing=work.remat,
            use_cpu=DEVICE == "cpu",
            report_to="none",
        )
        return GRPOTrainer(
            model=self.model(torch.float32),
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "x"}] * work.update_rows),
            processing_class=tokenizer,
        )


if __name__ == "__main__":
    main(TrlPrograms, *sys.argv[1:])
