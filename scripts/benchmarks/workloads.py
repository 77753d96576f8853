"""The named workloads: shapes as plain data, the arrays that go in, and the least work that each program needs.

Nothing here imports JAX or this project, so that workers in other environments can read it.

`long-tail` has response lengths from a log-normal distribution. For an update they are drawn by NumPy. A rollout
decides its own lengths, so there the weights draw them: token k is followed by token k - 1 with certainty (column
k - 1 of lm_head is the embedding of k), token 0 is the end of text, and the last prompt token is one whose logits are
the logarithms of the log-normal's probabilities. The first token drawn thus is the number of those to come. Layers
are computed in full and write little to the residual stream. Every sampler that draws from the softmax therefore
gets lengths of one distribution, and two with the same random numbers get the same lengths; no hook is needed.
"""

import dataclasses
import math

import numpy as np

SIGMA = 0.8  # of the log-normal: 1.6 % of the lengths are cut at the maximum
GROUP = 8  # rows whose advantages are compared


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of the programs.

    Attributes:
      num_prompts, group_size: of a rollout; its rows are their product.
      prompts_at_once: prompts that may be decoded at one time.
      prompt_size, response_size: tokens; all prompts have `prompt_size`.
      update_rows: of an update and of scoring.
      micro_batch_size: rows whose activations exist at one time.
      long_tail: whether response lengths are log-normal, with a mean of a quarter of `response_size`; else all are full.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    compute_dtype: str
    scan_layers: bool
    remat: bool
    num_prompts: int
    group_size: int
    prompts_at_once: int
    prompt_size: int
    response_size: int
    update_rows: int
    micro_batch_size: int
    long_tail: bool = False

    @property
    def rollout_rows(self) -> int:
        return self.num_prompts * self.group_size

    @property
    def layer_parameters(self) -> int:
        """Those of all layers."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * queries + 2 * keys) + queries + 2 * keys
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size)

    @property
    def bytes_per_number(self) -> int:
        """In the compute dtype."""
        return {"bfloat16": 2, "float32": 4}[self.compute_dtype]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """No end of text, so that every response is full, unless lengths are drawn."""
        return (0,) if self.long_tail else ()

    @property
    def start_token(self) -> int:
        """The last token of a prompt in `long-tail`, whose successor is the length."""
        return self.response_size


_QWEN = {"vocab_size": 151_936, "compute_dtype": "bfloat16", "scan_layers": True, "remat": True}
_HALF_B = _QWEN | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_layers": 24,
    "num_heads": 14,
    "num_kv_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_REFERENCE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "tie_word_embeddings": True,
    "compute_dtype": "float32",
    "scan_layers": False,
    "remat": False,
    "micro_batch_size": 16,
    "prompt_size": 32,
}
_ROLLOUT = {"num_prompts": 32, "group_size": 8, "prompts_at_once": 32, "prompt_size": 256, "response_size": 512}
_UNTIED = {"long_tail": True, "tie_word_embeddings": False}

CPU_REFERENCE = Workload(
    "cpu-reference", **_REFERENCE, num_prompts=128, group_size=1, prompts_at_once=128, response_size=64, update_rows=128
)
LARGE = {
    "0.5b": Workload("0.5b", **_HALF_B, **_ROLLOUT, update_rows=64, micro_batch_size=16),
    "1.5b": Workload(
        "1.5b",
        **_QWEN,
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        tie_word_embeddings=True,
        **_ROLLOUT,
        update_rows=64,
        micro_batch_size=8,
    ),
}
LONG_TAIL = {
    "cpu": Workload(
        "long-tail",
        **_REFERENCE | _UNTIED,
        num_prompts=32,
        group_size=GROUP,
        prompts_at_once=8,
        response_size=256,
        update_rows=64,
    ),
    "accelerator": Workload(
        "long-tail", **_HALF_B | _UNTIED, **_ROLLOUT | {"num_prompts": 128}, update_rows=64, micro_batch_size=16
    ),
}
NAMES = ("cpu-reference", *LARGE, "long-tail")
HELP = {
    "cpu-reference": "a float32 decoder of 3.3 million parameters, 128 rows of 32 + 64 tokens",
    "0.5b": "Qwen2 0.5B in bfloat16, for an accelerator: rollout 32 x 8 and update of 64 rows, 256 + 512 tokens",
    "1.5b": "the same with 1.5B",
    "long-tail": "log-normal response lengths: the reference decoder on a CPU, 0.5B on an accelerator",
}


def get(name: str, platform: str, *, tiny: bool = False) -> Workload:
    """The workload of a name on a platform ("cpu", "gpu", "tpu").

    Args:
      tiny: keep what kind of work it is, and make every size small: for tests.

    Raises:
      ValueError: an unknown name, or a workload that needs an accelerator on a CPU, unless it is tiny.
    """
    if name not in NAMES:
        raise ValueError(f"no workload {name!r}; {', '.join(NAMES)}")
    if name in LARGE and platform == "cpu" and not tiny:
        raise ValueError(f"{name} needs an accelerator (JAX finds a CPU only); --tiny runs the same programs in small")
    long_tail = LONG_TAIL["cpu" if platform == "cpu" else "accelerator"]
    workload = {"cpu-reference": CPU_REFERENCE, "long-tail": long_tail, **LARGE}[name]
    return _tiny(workload) if tiny else workload


def _tiny(workload: Workload) -> Workload:
    return dataclasses.replace(
        workload,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=64,
        num_prompts=max(1, 16 // workload.group_size),
        prompts_at_once=max(1, 16 // workload.group_size)
        // (1 if workload.prompts_at_once == workload.num_prompts else 2),
        prompt_size=8,
        response_size=16,
        update_rows=8,
        micro_batch_size=4,
    )


# Arrays -----------------------------------------------------------------------------------------------------------


def length_probabilities(workload: Workload) -> np.ndarray:
    """float64 [T]: the probability of each response length 1 to T, those beyond counted at T."""
    size = workload.response_size
    mean_of_log = math.log(size / 4) - SIGMA**2 / 2
    # A length L stands for the reals from L - 1/2 to L + 1/2, and for what is below or above at both ends.
    edges = (np.log(np.arange(1, size) + 0.5) - mean_of_log) / SIGMA
    below = np.array([0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges])
    return np.diff(np.concatenate([[0.0], below, [1.0]]))


def response_lengths(workload: Workload, rows: int) -> np.ndarray:
    """int32 [rows]: lengths for an update; the same on every call."""
    if not workload.long_tail:
        return np.full(rows, workload.response_size, np.int32)
    draws = np.random.default_rng(1).choice(workload.response_size, rows, p=length_probabilities(workload))
    return (draws + 1).astype(np.int32)


def prompts(workload: Workload) -> np.ndarray:
    """int32 [num_prompts, P]: the prompts of a rollout, without padding."""
    first = workload.start_token + 1 if workload.long_tail else 0
    shape = workload.num_prompts, workload.prompt_size
    tokens = np.random.default_rng(2).integers(first, workload.vocab_size, shape, dtype=np.int32)
    if workload.long_tail:
        tokens[:, -1] = workload.start_token
    return tokens


def update_arrays(workload: Workload) -> dict[str, np.ndarray]:
    """What an update and scoring read: tokens [B, P + T], response_length [B], behavior_logp [B, T], advantage [B]."""
    rng, rows = np.random.default_rng(3), workload.update_rows
    size = workload.prompt_size + workload.response_size
    return {
        "tokens": rng.integers(0, workload.vocab_size, (rows, size), dtype=np.int32),
        "response_length": response_lengths(workload, rows),
        "behavior_logp": np.full((rows, workload.response_size), -math.log(workload.vocab_size), np.float32),
        "advantage": np.tile(np.float32([1, -1]), rows // 2),
    }


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """float32 [B]: rewards less the mean of their `GROUP` rows, by its deviation."""
    groups = rewards.reshape(-1, GROUP)
    centered = groups - groups.mean(axis=1, keepdims=True)
    return (centered / (groups.std(axis=1, keepdims=True) + 1e-6)).reshape(-1).astype(np.float32)


def length_weights(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """(embedding [V, E], lm_head [E, V]) float32 of a decoder that draws lengths; see the top of this file."""
    hidden, vocab, size = workload.hidden_size, workload.vocab_size, workload.response_size
    certain, start = 60.0, workload.start_token
    embedding = np.random.default_rng(4).normal(size=(vocab, hidden)).astype(np.float32)
    embedding[:, 0], embedding[start] = 0.0, 0.0  # coordinate 0 is that of the start token
    embedding[start, 0] = 1.0
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    lm_head = np.zeros((hidden, vocab), np.float32)
    lm_head[:, : size - 1] = certain * embedding[1:size].T
    lm_head[0] = -certain
    lm_head[0, :size] = np.log(np.maximum(length_probabilities(workload), 1e-20))
    # The last norm scales a unit vector by the root of its size.
    return embedding, lm_head / math.sqrt(hidden)


# Facts ------------------------------------------------------------------------------------------------------------


def update_facts(workload: Workload) -> dict:
    """Tokens and lengths of an update or of scoring: prompts and responses, without padding."""
    lengths = response_lengths(workload, workload.update_rows)
    return {"tokens": int(lengths.sum()) + len(lengths) * workload.prompt_size, "lengths": lengths.tolist()}


def rollout_facts(workload: Workload, generate) -> dict:
    """Sample the whole rollout with a function that knows neither groups nor batches, and say what came out.

    Args:
      generate: prompts, lists of token ids, to responses, lists of token ids, of which what follows an end of text does not count.
    """
    rows = np.repeat(prompts(workload), workload.group_size, axis=0).tolist()
    size, lengths = workload.prompts_at_once * workload.group_size, []
    for start in range(0, len(rows), size):
        for response in generate(rows[start : start + size]):
            ends = [response.index(eos) + 1 for eos in workload.eos_ids if eos in response]
            lengths.append(min(ends, default=len(response)))
    return {"tokens": sum(lengths), "lengths": lengths}


# Least work -------------------------------------------------------------------------------------------------------


def forward_flops(workload: Workload, prompt_lengths, lengths) -> float:
    """Multiplications and additions of one forward pass of rows of these lengths that unembeds the responses."""
    total, lengths = np.asarray(prompt_lengths, float) + lengths, np.asarray(lengths, float)
    attention = 2 * workload.num_layers * workload.num_heads * workload.head_dim * np.sum(total**2)
    unembedding = 2 * workload.vocab_size * workload.hidden_size * np.sum(lengths)
    return float(2 * workload.layer_parameters * np.sum(total) + unembedding + attention)


def rollout_bytes(workload: Workload, lengths) -> float:
    """Bytes that decoding must read: the weights once a step of a full batch, and the keys and values filled so far.

    A prompt's keys and values count once a step for its whole group. `lengths` [rows] are in the order of the prompts.
    """
    lengths = np.asarray(lengths, float).reshape(workload.num_prompts, workload.group_size)
    steps = max(lengths.max(), lengths.sum() / (workload.prompts_at_once * workload.group_size))
    weights = workload.layer_parameters + workload.vocab_size * workload.hidden_size
    column = 2 * workload.num_layers * workload.num_kv_heads * workload.head_dim
    own, shared = np.sum(lengths * (lengths + 1) / 2), workload.prompt_size * np.sum(lengths.max(axis=1))
    return float(workload.bytes_per_number * (steps * weights + column * (own + shared)))
