"""The programs of a workload in plain PyTorch and Transformers; benchmark.py starts it in TRL's environment.

    python torch_programs.py WORKLOAD.json WEIGHTS

`generate` with a static batch, and a clipped update of micro-batches: scaled dot-product attention, autocast to the
compute dtype, gradient checkpointing where the workload recomputes activations.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks import workloads
from serving import Steps, serve
from transformers import AutoModelForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Programs(Steps):
    def __init__(self, workload, weights):
        self.workload, self.weights = workload, weights

    def peak_bytes(self):
        return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None

    def release(self):
        super().release()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _rollout(self):
        model = self.model(getattr(torch, self.workload.compute_dtype)).eval()
        eos_ids = list(self.workload.eos_ids) or None
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}

        def generate(rows):
            tokens = torch.tensor(rows, device=DEVICE)
            with torch.no_grad():
                return model.generate(
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=self.workload.response_size,
                    eos_token_id=eos_ids,
                    **settings,
                )[:, tokens.shape[1] :].tolist()

        return lambda: workloads.rollout_facts(self.workload, generate), {}

    def _scoring(self):
        model, batches = self.model(getattr(torch, self.workload.compute_dtype)).eval(), self.batches()

        def step():
            with torch.no_grad():
                for batch in batches:
                    self.logps(model, batch)
            synchronize()

        return step, workloads.update_facts(self.workload)

    def _update(self):
        model, batches = self.model(torch.float32).train(), self.batches()
        if self.workload.remat:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
        total = sum(batch["mask"].sum() for batch in batches)

        def step():
            for batch in batches:
                ratio = torch.exp(self.logps(model, batch) - batch["old_logp"])
                clipped = torch.clamp(ratio, 0.8, 1.2)
                gain = torch.minimum(ratio * batch["advantage"], clipped * batch["advantage"])
                (-(gain * batch["mask"]).sum() / total).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            synchronize()

        return step, workloads.update_facts(self.workload)

    def model(self, dtype):
        """The weights in `dtype`, on the device."""
        model = AutoModelForCausalLM.from_pretrained(self.weights, dtype=dtype, attn_implementation="sdpa").to(DEVICE)
        model.generation_config.eos_token_id = None
        return model

    def batches(self):
        """Micro-batches of the update, as tensors on the device."""
        arrays = workloads.update_arrays(self.workload)
        size, prompt = self.workload.micro_batch_size, self.workload.prompt_size
        x = {name: torch.tensor(array, device=DEVICE) for name, array in arrays.items()}
        columns = torch.arange(x["tokens"].shape[1], device=DEVICE)
        attention = (columns < prompt + x["response_length"][:, None]).long()
        whole = {
            "tokens": x["tokens"].long(),
            "attention": attention,
            "mask": attention[:, prompt:],
            "old_logp": x["behavior_logp"],
            "advantage": x["advantage"][:, None],
        }
        parts = [
            dict(zip(whole, split, strict=True)) for split in zip(*(y.split(size) for y in whole.values()), strict=True)
        ]
        return parts

    def logps(self, model, batch):
        """Log-probabilities [b, T] of the responses of a micro-batch."""
        size = self.workload.response_size
        dtype = getattr(torch, self.workload.compute_dtype)
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            out = model(batch["tokens"], attention_mask=batch["attention"], logits_to_keep=size + 1, use_cache=False)
        targets = batch["tokens"][:, -size:, None]
        return torch.log_softmax(out.logits[:, :-1].float(), dim=-1).gather(-1, targets)[..., 0]


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main(kind, workload, weights):
    """Serve `kind`, a class of programs."""
    fields = json.loads(Path(workload).read_text(encoding="utf-8"))
    serve(kind(workloads.Workload(**fields), weights))


if __name__ == "__main__":
    main(Programs, *sys.argv[1:])
