"""What may be changed of a run that has begun: the settings that do not decide what it learns."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from r2vpo_jax.config.flags import leaves

# What is computed does not depend on these: how often something is written or looked at, limits, who judges, and where the
# server is that samples. A time or memory limit decides about a response that reaches it, as the speed of the machine does.
FREE = (
    "alarms", "replay.overlap", "replay.wait_limit", "trainer.allow_single_update", "trainer.checkpoint_every", "trainer.eval_every", "trainer.max_checkpoints",
    "trainer.max_noise_floor", "trainer.max_nonfinite_updates", "trainer.report_every", "trainer.samples_per_iteration", "trainer.trackers", "trainer.tracker_project",
    "sampler.endpoint.concurrency", "sampler.endpoint.key_variable", "sampler.endpoint.model", "sampler.endpoint.patience",
    "sampler.endpoint.publish_dir", "sampler.endpoint.publish_path", "sampler.endpoint.publisher", "sampler.endpoint.timeout",
    "sampler.endpoint.url", "task.text.data_dir", "task.verifier.memory_limit_mb", "task.verifier.num_workers", "task.verifier.time_limit",
)  # fmt: skip

# The same sums, taken in another order or in other pieces: equal in exact arithmetic, not in the last digits.
ROUNDING = (
    "mesh", "trainer.micro_batch_size", "trainer.packing", "trainer.scoring_chunk_size", "sampler.batch_size", "sampler.prompt_buckets",
    "sampler.segment_length", "evaluation.batch_size", "evaluation.segment_length",
    "model.attention", "model.attention_block_size", "model.remat", "model.scan_layers",
    "model.float32_logits", "model.float32_residual", "model.float32_scores",
)  # fmt: skip

_FORMER = ("trainer.tensorboard",)  # of runs that an earlier version has begun: it was no more than FREE

_LONGER = "trainer.num_iterations"


@dataclasses.dataclass(frozen=True)
class Changes:
    """How a configuration differs from the one that a run was last started with: "seed: 0 there, 1 here", …"""

    refused: tuple[str, ...] = ()  # it would be another run
    free: tuple[str, ...] = ()
    rounding: tuple[str, ...] = ()
    longer: tuple[str, ...] = ()  # more iterations

    @property
    def accepted(self) -> tuple[str, ...]:
        """What a run goes on with."""
        return (*self.free, *self.rounding, *self.longer)


def compare(there: Mapping[str, Any], here: Mapping[str, Any]) -> Changes:
    """The differences between two configurations, sorted by what they mean for a run that goes on.

    Args:
      there: nested plain values as JSON gives them, of the configuration that the run was last started with.
      here: the same of the one that it is to go on with.
    """
    old, new = dict(leaves(there)), dict(leaves(here))
    found: dict[str, list[str]] = {field.name: [] for field in dataclasses.fields(Changes)}
    for path in sorted(old.keys() | new.keys()):
        before, now = old.get(path, "absent"), new.get(path, "absent")
        if before != now:
            kind, why = _kind(path, before, now, new)
            found[kind].append(f"{path}: {before} there, {now} here{why}")
    return Changes(**{kind: tuple(texts) for kind, texts in found.items()})


def _kind(path: str, before, now, values: Mapping[str, Any]) -> tuple[str, str]:
    """(field of Changes, what there is to say of a refusal)."""
    for kind, paths in (("free", FREE + _FORMER), ("rounding", ROUNDING)):
        if any(path == allowed or path.startswith(f"{allowed}.") for allowed in paths):
            return kind, ""  # also where one of the two, of another version of this code, does not have it yet
    if "absent" in (before, now):
        return "refused", ""
    if path == _LONGER:
        if now < before:
            return "refused", ", fewer than it was started for"
        if (schedule := values["optimizer.schedule"]) != "constant":
            return "refused", f", and optimizer.schedule={schedule} is over all of them"
        return "longer", ""
    return "refused", ""
