"""How responses are sampled: rollouts, by this program or by a server (docs/engines.md), and scores."""

import dataclasses
import urllib.parse

from r2vpo_jax.config.fields import option, require, require_choice, require_integers, require_range, section

SAMPLING_WEIGHTS = ("compute", "bfloat16", "int8")
SEGMENT_LENGTH = 64  # tokens; the shipped arithmetic tasks, whose responses are shorter than two, keep one program
_SEGMENT_LENGTH_TEXT = (
    "tokens that responses are given room for at first, at least: longer ones grow, and those that are done make room "
    "(0 = room for the longest, and a batch ends together)"
)
ENGINES = ("own", "endpoint")
PUBLISHERS = ("sglang", "vllm")
PUBLISHED_DTYPES = ("float32", "bfloat16", "float16", "stored")


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """A server with an OpenAI-compatible /v1/completions that gives token ids and log-probabilities."""

    url: str = option("http://127.0.0.1:8000", "address of the server, without /v1")
    model: str = option("", "name under which it serves the policy (default: the one model it has)")
    key_variable: str = option("", "environment variable that holds the API key, if the server wants one")
    concurrency: int = option(64, "requests at one time, of each process; one request is one response")
    timeout: float = option(600.0, "seconds for one answer")
    patience: float = option(120.0, "seconds that a request is tried again before the run ends, if the server fails")
    seeds: bool = option(True, "send a seed with each request; off for engines that refuse one (vLLM on TPUs)")
    publisher: str = option("sglang", "how it is told of new weights: sglang or vllm")
    publish_path: str = option("", "path that is posted to, in place of the publisher's own")
    publish_every: int = option(1, "iterations between two times that the server gets new weights")
    publish_dir: str = option(
        "", "folder for them, which the server reads too (default: published/ in the run directory)"
    )
    publish_dtype: str = option("float32", "dtype of the published weights: float32, bfloat16, float16 or stored")

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        require(
            parts.scheme in ("http", "https")
            and parts.hostname
            and not (parts.query or parts.fragment or parts.username),
            f"sampler.endpoint.url={self.url!r} must be an address such as http://127.0.0.1:8000",
        )
        require(
            not parts.path.rstrip("/").endswith("/v1"),
            f"sampler.endpoint.url={self.url!r} must be without /v1, which is added where it belongs",
        )
        require_range("sampler.endpoint", self, "concurrency publish_every", ">= 1")
        require_range("sampler.endpoint", self, "timeout", "> 0")
        require_range("sampler.endpoint", self, "patience", ">= 0")
        require_choice("sampler.endpoint", self, {"publisher": PUBLISHERS, "publish_dtype": PUBLISHED_DTYPES})
        require(
            not self.publish_path or self.publish_path.startswith("/"),
            f"sampler.endpoint.publish_path={self.publish_path!r} must begin with /",
        )


@dataclasses.dataclass(frozen=True)
class StopConfig:
    """Where responses end, besides the model's own ends of text."""

    stop: tuple[str, ...] = option(
        (), "text tasks: strings that end a response; what follows is neither judged nor learned"
    )

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        require(
            all(isinstance(string, str) and string for string in self.stop),
            f"sampler.stop={self.stop!r} must be strings that are not empty",
        )


def _samples_itself(sampler) -> bool:
    return sampler.engine == "own"


@dataclasses.dataclass(frozen=True)
class SamplerConfig(StopConfig):
    """Rollouts. top_k and top_p serve evaluation only: training with them is refused."""

    group_size: int = option(16, "samples per prompt (G)")
    temperature: float = option(1.0, "softmax temperature; scoring applies the same")
    batch_size: int = option(1024, "responses sampled at one time, all devices together")
    segment_length: int = option(SEGMENT_LENGTH, _SEGMENT_LENGTH_TEXT, when=_samples_itself)
    prompt_buckets: tuple[int, ...] = option(
        (), "prompt lengths below the longest that get a program of their own", when=_samples_itself
    )
    weights: str = option(
        "compute",
        "what rollouts are sampled with: compute (the learner's weights), or these rounded to bfloat16 or int8",
        when=_samples_itself,
    )
    engine: str = option(
        "own", "who samples rollouts: own, or endpoint (a server; scores are sampled here all the same)"
    )
    endpoint: EndpointConfig = section(EndpointConfig, when=lambda s: not _samples_itself(s))

    def __post_init__(self):
        super().__post_init__()
        require_choice("sampler", self, {"weights": SAMPLING_WEIGHTS, "engine": ENGINES})
        require(self.group_size >= 2, f"sampler.group_size must be at least 2 (a baseline), got {self.group_size}")
        require(self.temperature > 0, f"sampler.temperature must be > 0 for training, got {self.temperature}")
        require(
            self.batch_size >= self.group_size,
            f"sampler.batch_size={self.batch_size} counts responses: it must hold a group of "
            f"sampler.group_size={self.group_size}",
        )
        require_range("sampler", self, "segment_length", ">= 0")
        object.__setattr__(self, "prompt_buckets", tuple(self.prompt_buckets))
        require_integers("sampler", self, "prompt_buckets", ">= 1")


@dataclasses.dataclass(frozen=True)
class ScoreSamplingConfig:
    """How responses are sampled for scores: validation and test of a run, and experiments.evaluate."""

    temperature: float = option(1.0, "sampling temperature for scores (0 = greedy)")
    top_p: float = option(1.0, "nucleus sampling mass (1 = off)")
    top_k: int = option(0, "most likely tokens that are sampled from (0 = off)")
    batch_size: int = option(1024, "responses sampled at one time, all devices together")
    segment_length: int = option(SEGMENT_LENGTH, _SEGMENT_LENGTH_TEXT)

    def __post_init__(self):
        require_range("evaluation", self, "temperature top_k segment_length", ">= 0")
        require_range("evaluation", self, "top_p", "in (0, 1]")
        require_range("evaluation", self, "batch_size", ">= 1")
