"""A server in the place of the sampler: what it is asked, what of its answers is believed, and what becomes of a bad one."""

import time

import jax
import numpy as np
import pytest

from r2vpo_jax.config import EndpointConfig
from r2vpo_jax.errors import EngineError, UsageError
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.models.stops import stop_table
from r2vpo_jax.rows import all_rows
from r2vpo_jax.sampler import Published, Sampling
from r2vpo_jax.sampler.decoding import row_keys
from r2vpo_jax.sampler.endpoint import Endpoint, EndpointSampler, keys_of, seeds_of
from r2vpo_jax.training.engines import posts
from tests.helpers.engines import MODELS, completion, stub

EOS, LONGEST, KEY = 1, 5, jax.random.key(7)
PROMPTS = np.array([[0, 0, 5, 6], [3, 4, 5, 6]], np.int32)
LENGTHS, PROBLEMS = np.array([2, 4], np.int32), np.array([11, 3], np.int32)
GOOD = completion([9, 8, EOS], [-0.25, -1.5, -0.125])


def sampling(**changes):
    return Sampling(group_size=2, max_response_length=LONGEST, eos_ids=(EOS,), temperature=0.8, **changes)


@pytest.fixture
def ask(mesh, tiny_model):
    """Rollout of two prompts of two responses from a server, or whatever is raised."""

    def ask(url, *, model=tiny_model[0], stop=(), how=None, version=7, **settings):
        settings = {"patience": 0.3, "timeout": 5.0, "model": "policy"} | settings
        sampler = EndpointSampler(Endpoint(EndpointConfig(url=url, **settings)), model, stop)
        rollout = sampler.sample(
            Published(4, "4-ab"), PROMPTS, LENGTHS, KEY, how or sampling(), problem_ids=PROBLEMS, version=version,
            rows=all_rows(mesh, 2, 2),
        )  # fmt: skip
        return rollout, sampler.statistics()

    return ask


def test_a_rollout_is_what_the_server_says(ask):
    def answer(path, body):
        if body["prompt"] == [5, 6]:
            return 200, GOOD, {}
        return 200, completion([9] * LONGEST, finish="length"), {}

    with stub(answer) as server:
        rollout, said = ask(server.url)
    np.testing.assert_array_equal(rollout.tokens[:, :4], PROMPTS[[0, 0, 1, 1]])
    np.testing.assert_array_equal(rollout.response_tokens, [[9, 8, EOS, 0, 0]] * 2 + [[9] * 5] * 2)
    np.testing.assert_array_equal(
        rollout.behavior_logp, np.float32([[-0.25, -1.5, -0.125, 0, 0]] * 2 + [[-0.5] * 5] * 2)
    )
    np.testing.assert_array_equal(rollout.response_length, [3, 3, 5, 5])
    np.testing.assert_array_equal(rollout.truncated, [False, False, True, True])
    np.testing.assert_array_equal(rollout.group_id, [11, 11, 3, 3])
    np.testing.assert_array_equal(rollout.version, [4] * 4)  # of the weights that it was given
    np.testing.assert_array_equal(rollout.temperature, np.float32([0.8] * 4))
    np.testing.assert_array_equal(rollout.rollout_id, np.arange(4))
    assert np.isnan(rollout.reward).all()
    assert (said["engine/requests"], said["engine/retries"], said["engine/weights_age"]) == (4, 0, 3)
    assert said["throughput/engine_tokens_per_second"] > 0


def test_a_request_leaves_nothing_to_the_defaults_of_a_server(ask, tiny_model, monkeypatch):
    without_token = range(tiny_model[0].config.num_tokens, tiny_model[0].config.vocab_size)
    assert without_token, "rows of the embedding that no token has are wanted"
    monkeypatch.setenv("OUR_KEY", "secret")
    with stub(lambda *_: (200, GOOD, {})) as server:
        ask(server.url, key_variable="OUR_KEY", stop=("xy",))
        ask(server.url, seeds=False)
    assert {path for path, *_ in server.seen} == {"/v1/completions"}
    _, body, headers = server.seen[0]
    assert headers["Authorization"] == "Bearer secret"
    seeds = {sent.pop("seed") for _, sent, _ in server.seen[:4]}
    expected = jax.random.key_data(row_keys(KEY, PROBLEMS, np.arange(2))).reshape(4, 2)
    assert seeds == {int(np.asarray(words).view(np.int64)[0]) for words in np.asarray(expected)}
    del body["prompt"]
    assert body == {
        "model": "policy", "max_tokens": LONGEST, "n": 1, "temperature": 0.8, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": 0, "stop_token_ids": [EOS],
        "skip_special_tokens": False, "return_token_ids": True, "return_tokens_as_token_ids": True, "stop": ["xy"],
        "logit_bias": {str(i): -100 for i in without_token},
    }  # fmt: skip
    _, body, headers = server.seen[4]
    assert not {"seed", "stop"} & body.keys()
    assert "Authorization" not in headers
    with pytest.raises(UsageError, match="key_variable=NO_SUCH_KEY: there is no such variable"):
        ask(server.url, key_variable="NO_SUCH_KEY")


def test_a_seed_is_the_key_of_a_draw():
    keys = row_keys(KEY, PROBLEMS, np.arange(3)).reshape(-1)
    seeds = seeds_of(KEY, PROBLEMS, 3).tolist()
    assert len(set(seeds)) == 6
    assert min(seeds) < 0 < max(seeds), "both signs are wanted"
    np.testing.assert_array_equal(jax.random.key_data(keys_of(seeds)), jax.random.key_data(keys))


def _spelled(tokens):
    answer = completion(tokens)
    del answer["choices"][0]["token_ids"]
    answer["choices"][0]["logprobs"]["tokens"] = [f"token_id:{token}" for token in tokens]
    return answer


def _changed(**choice):
    answer = completion([9, EOS])
    answer["choices"][0] |= choice
    return answer


def test_ids_may_be_spelled_and_a_response_ends_where_the_run_says(ask, tiny_config):
    """The first end counts, whatever a server goes on with; a stop string is found here, or by the server in its text."""
    tokenizer = open_base_model(tiny_config().model).tokenizer
    digit = {int(tokenizer.decode([i])): i for i in range(len(tokenizer)) if tokenizer.decode([i]).isdigit()}
    with_stop = sampling(stop=stop_table(["12"], tokenizer))
    cases = {
        "spelled": (_spelled([9, EOS]), sampling(), 2, True),
        "goes on": (completion([9, EOS, 9, 9]), sampling(), 2, True),
        "a stop string": (completion([digit[3], digit[1], digit[2], digit[4]], finish="length"), with_stop, 3, True),
        "one that the server found": (completion([digit[3], digit[1]]), with_stop, 2, True),
        "none": (completion([digit[3]] * LONGEST, finish="length"), with_stop, LONGEST, False),
        "the prompt, as it was": (_changed(prompt_token_ids=None), sampling(), 2, True),
    }
    wrong = {}
    for name, (answer, how, length, ended) in cases.items():
        with stub(lambda *_, answer=answer: (200, answer, {})) as server:
            rollout, _ = ask(server.url, how=how, stop=("12",) if how is with_stop else ())
        found = (int(rollout.response_length[0]), not rollout.truncated[0])
        if found != (length, ended):
            wrong[name] = found
    assert not wrong


BAD = {
    "without choices": ({"error": "?"}, "without choices: it must be an OpenAI-compatible /v1/completions"),
    "a list": ([], "without choices"),
    "null": (None, "without choices"),
    "choices of another kind": ({"choices": ["x"]}, "without choices"),
    "two responses": ({"choices": [{}, {}]}, "with 2 responses where one was asked for"),
    "no token ids": (_changed(token_ids=None), "without token ids: it needs return_token_ids"),
    "texts": (
        _changed(token_ids=None, logprobs={"tokens": ["a", "b"], "token_logprobs": [-1, -1]}),
        "without token ids",
    ),
    "ids that are none": (_changed(token_ids=[True, 1.0]), "without token ids"),
    "no log-probabilities": (_changed(logprobs=None), "with no log-probabilities for 2 tokens"),
    "one too few": (completion([9, EOS], [-1.0]), "with 1 log-probabilities for 2 tokens"),
    "no tokens": (completion([]), f"with 0 tokens where 1 to {LONGEST} were asked for"),
    "too many tokens": (completion([9] * (LONGEST + 1)), f"with {LONGEST + 1} tokens where"),
    "beyond the vocabulary": (completion([9, 10**6]), "with token 1000000, and there are"),
    "a negative id": (completion([-1]), "with token -1, and there are"),
    "NaN": (completion([9, EOS], [-1.0, float("nan")]), "with nan for the log-probability of a token that was sampled"),
    "-inf": (completion([9, EOS], [float("-inf"), -1.0]), "with -inf for the log-probability"),
    "what vLLM writes for -inf": (completion([9, EOS], [-9999.0, -1.0]), "with -9999.0 for the log-probability"),
    "a probability above 1": (completion([9, EOS], [-1.0, 0.5]), "with 0.5 for the log-probability"),
    "null for one": (completion([9, EOS], [-1.0, None]), "with None for the log-probability"),
    "true for one": (completion([9, EOS], [-1.0, True]), "with True for the log-probability"),
    "a whole number without end": (completion([9, EOS], [-1.0, 10**400]), "for the log-probability"),
    "another prompt": (_changed(prompt_token_ids=[0]), "to another prompt: 1 tokens where"),
    "cut off": (completion([9], finish="length"), f"that was cut off after 1 of {LONGEST} tokens: its limit of prompt"),
    "another end of text": (completion([9, 8]), "that ended (stop) after token 8, which is none of the ends of text (1,)"),
    "aborted": (completion([9], finish="abort"), "that ended (abort) after token 9"),
}  # fmt: skip
WIRES = {
    "no JSON": ((200, b"<html>", {}), "answers what is no JSON: <html>"),
    "deep JSON": ((200, b"[" * 100_000, {}), "answers what is no JSON"),
    "too much": ((200, b" " * (2 << 20), {}), "answers with more than 1,0"),
    "too much, in parts": (
        (200, (b"1000\r\n" + b" " * 4096 + b"\r\n") * 512, {"Transfer-Encoding": "chunked", "Content-Length": ""}),
        "answers with more than 1,0",
    ),
    "elsewhere": ((302, b"", {"Location": "http://127.0.0.1:1/"}), "is redirected (status 302), which is not followed"),
    "refused": (
        (400, {"error": {"message": "max_tokens is \u001b[31mtoo large"}}, {}),
        'is refused (status 400): {"error": {"message": "max_tokens is',
    ),
    "not there": ((404, b"nothing \x1b[2J here", {}), "is refused (status 404): nothing ?[2J here"),
}


def test_an_answer_that_cannot_be_learned_from_is_one_clear_line(ask):
    wrong = {}
    answers = {name: ((200, answer, {}), message) for name, (answer, message) in BAD.items()} | WIRES
    for name, (answer, message) in answers.items():
        with stub(lambda *_, answer=answer: answer) as server, pytest.raises(UsageError) as refused:
            ask(server.url)
        text = str(refused.value)
        if message not in text or len(text) > 600 or not text.isprintable():
            wrong[name] = text
    assert not wrong


def test_what_fails_in_passing_is_tried_again(ask):
    states = iter([(None, b"", {}), (503, b"busy", {}), (429, b"", {})])
    with stub(lambda *_: next(states, (200, GOOD, {}))) as server:
        _, said = ask(server.url, patience=20.0, concurrency=1)
    assert said["engine/retries"] == 3
    assert said["engine/requests"] == 4
    assert len(server.seen) == 7


def test_a_connection_that_was_idle_is_no_fault(ask):
    """Servers close what is not used for a while without saying so."""
    with stub(lambda *_: (200, GOOD, {"Connection": "keep-alive"})) as server:
        original = server.handler.handle_one_request

        def one_request_only(self):
            original(self)
            self.close_connection = True

        server.handler.handle_one_request = one_request_only
        _, said = ask(server.url, concurrency=1)
    assert said["engine/retries"] == 0


def test_a_server_that_is_gone_ends_the_run_in_time(ask):
    with (
        stub(lambda *_: (503, b"loading", {})) as server,
        pytest.raises(EngineError, match=r"/v1/completions \(status 503: loading; tried for"),
    ):
        ask(server.url)
    with pytest.raises(EngineError, match=r"does not answer POST /v1/completions \(Connection refused; tried for"):
        ask(server.url)
    with (
        stub(lambda *_: (200, b"{", {"Content-Length": "100"})) as server,
        pytest.raises(EngineError, match="no answer in time|cut off"),
    ):
        ask(server.url, timeout=0.2)


def test_the_first_failure_ends_the_others(ask):
    """Requests that a server never answers are not waited for, once one has failed for good."""

    def answer(path, body):
        if body["prompt"] == [5, 6]:
            server.hang()
        return 400, {}, {}

    begun = time.monotonic()
    with stub(answer) as server, pytest.raises(UsageError, match="status 400"):
        ask(server.url, timeout=60.0)
    assert time.monotonic() - begun < 9, "it has waited for those that hang"


def test_other_weights_are_noticed(ask):
    """A server that was restarted has the weights it began with. One that takes no name always says the same."""

    def said(name):
        return 200, GOOD | {"metadata": {"weight_version": name}}, {}

    for good in ("4-ab", "default", None):
        with stub(lambda *_, good=good: said(good)) as server:
            ask(server.url)
    for other in ("4-cd", "3-ab", "4"):
        with (
            stub(lambda *_, other=other: said(other)) as server,
            pytest.raises(
                EngineError, match=f"answers with the weights {other}, and was given 4-ab: it was restarted, or"
            ),
        ):
            ask(server.url)
    names = iter(["4-ab", "default", "default", "default"])
    with (
        stub(lambda *_: said(next(names))) as server,
        pytest.raises(EngineError, match="answers with the weights default, and was given 4-ab"),
    ):
        ask(server.url, concurrency=1)


LISTS = {
    "its only model": ({}, MODELS, None),
    "one by name": ({"model": "b"}, {"data": [{"id": "a"}, {"id": "b"}]}, None),
    "several": ({}, {"data": [{"id": "a"}, {"id": "b"}]}, "serves a, b: name one by sampler.endpoint.model"),
    "none": ({}, {"data": []}, "serves no model: name one"),
    "another": ({"model": "c"}, MODELS, "does not serve sampler.endpoint.model=c, but policy"),
    "no list": ({}, {"hello": 1}, "/v1/models lists no models: it must be an OpenAI-compatible server"),
    "names that are none": ({}, {"data": [{"id": 3}]}, "lists no models"),
    "short texts": ({}, {"data": [{"id": "a", "max_model_len": 19}]}, "takes 19 tokens of prompt and response together"),
}  # fmt: skip


def test_a_server_is_looked_at_before_anything_is_lost():
    wrong = {}
    for name, (settings, listed, message) in LISTS.items():
        with stub(lambda *_, listed=listed: (200, listed, {})) as server:
            endpoint = Endpoint(EndpointConfig(url=server.url + "/", patience=0.2, **settings))
            try:
                said = endpoint.check(20)
            except UsageError as error:
                said = str(error)
        if (message or "rollouts: sampled by") not in said or server.seen[0][0] != "/v1/models":
            wrong[name] = said
    assert not wrong


def test_publishers():
    """As SGLang's and vLLM's own servers take it."""
    config = EndpointConfig()
    body = {"model_path": "/w/8", "weight_version": "8-ab", "flush_cache": True}
    assert posts(config, "/w/8", "8-ab") == [("/update_weights_from_disk", body)]
    assert posts(EndpointConfig(publish_path="/reload"), "/w/8", "8-ab") == [("/reload", body)]
    reload = {"method": "reload_weights", "kwargs": {"weights_path": "/w/8"}}
    assert posts(EndpointConfig(publisher="vllm"), "/w/8", "8-ab") == [
        ("/collective_rpc", reload),
        ("/reset_prefix_cache", {}),
    ]
