"""Our own sampler as a server: the tokens that it gives, what it refuses, and how it comes by other weights."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import types
import urllib.parse

import jax
import numpy as np
import pytest

from r2vpo_jax import sampler
from r2vpo_jax.config import EndpointConfig, ModelConfig
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.rows import all_rows
from r2vpo_jax.sampler.endpoint import Endpoint, EndpointSampler
from r2vpo_jax.sampler.protocol import OwnSampler, Published
from tests.helpers.engines import served, wait_for
from tests.helpers.paths import ROOT

KEY = jax.random.key(3)
JSON = "Content-Type: application/json"


@pytest.fixture(scope="module")
def server(tiny_checkpoint):
    with served(tiny_checkpoint) as made:
        yield made


def ask(server, path, body, method="POST", kind="application/json"):
    """(status, answer) of a request."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body)
    connection.request(method, path, None if method == "GET" else content, {"Content-Type": kind})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def complete(server, **body):
    status, answer = ask(server, "/v1/completions", {"prompt": [3, 4], "max_tokens": 6} | body)
    assert status == 200, answer
    return answer


@pytest.fixture(scope="module")
def batch(task):
    """What the samplers of a run are asked for."""
    problems = task.problems("train", np.arange(4))
    settings = sampler.Sampling(group_size=4, max_response_length=task.max_response_length, eos_ids=task.eos_ids)
    return problems, settings


def sample(with_sampler, weights, batch, mesh):
    problems, settings = batch
    how = {"problem_ids": problems.index, "version": 0, "rows": all_rows(mesh, 4, 4)}
    return with_sampler.sample(weights, problems.tokens, problems.length, KEY, settings, **how)


def through(server, batch, model, mesh, **settings):
    endpoint = Endpoint(EndpointConfig(url=server.url, **settings))
    endpoint.check(20)
    return sample(EndpointSampler(endpoint, model), Published(0, "default"), batch, mesh)


def test_it_gives_the_tokens_that_a_run_would_have_drawn_itself(server, batch, rollout, tiny_model, mesh):
    """The same key, the same tokens, and log-probabilities to rounding; however many requests are there at one time."""
    model, params = tiny_model
    own = sample(OwnSampler(model, mesh, batch_size=4, buckets=(), segment_length=64), params, batch, mesh)
    np.testing.assert_array_equal(own.tokens, rollout.tokens)  # of `generate`
    for concurrency in (1, 64):
        there = through(server, batch, model, mesh, concurrency=concurrency)
        for name in ("tokens", "prompt_length", "response_length", "truncated", "group_id", "rollout_id", "version"):
            found, expected = getattr(there, name), getattr(own, name)
            np.testing.assert_array_equal(found, expected, err_msg=name)
            assert found.dtype == expected.dtype, name
        np.testing.assert_allclose(there.behavior_logp, own.behavior_logp, atol=1e-5)


@pytest.mark.slow
def test_a_server_of_lower_precision_differs_and_says_by_how_much(tiny_checkpoint, batch, tiny_model, mesh):
    """Its log-probabilities are those of what it sampled from: the rounded weights."""
    model, params = tiny_model
    own = OwnSampler(model, mesh, batch_size=4, buckets=(), segment_length=64)
    with served(tiny_checkpoint, weights="int8") as server:
        there = through(server, batch, model, mesh)
    rounded = sample(own, sampler.rounded_weights(params, "int8"), batch, mesh)
    np.testing.assert_array_equal(there.tokens, rounded.tokens)
    np.testing.assert_allclose(there.behavior_logp, rounded.behavior_logp, atol=1e-5)
    plain = sample(own, params, batch, mesh)
    assert np.abs(rounded.behavior_logp - plain.behavior_logp).max() > 1e-3


def test_a_completion_has_what_was_asked_for(server, tiny_model):
    base = server._engine.base
    tokenizer = base.tokenizer
    plain = complete(server, seed=5)
    (choice,) = plain["choices"]
    assert choice["logprobs"] is None
    assert "token_ids" not in choice
    assert plain["model"] == "policy"
    full = complete(server, seed=5, logprobs=0, return_token_ids=True, return_tokens_as_token_ids=True)
    (choice,) = full["choices"]
    tokens = choice["token_ids"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in tokens]
    assert all(logp <= 0 for logp in choice["logprobs"]["token_logprobs"])
    assert choice["text"] == plain["choices"][0]["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    ended = tokens[-1] in base.eos_ids
    assert choice["finish_reason"] == ("stop" if ended else "length")
    assert full["usage"] == {"prompt_tokens": 2, "completion_tokens": len(tokens), "total_tokens": 2 + len(tokens)}
    assert full["metadata"] == {"weight_version": "default"}

    several = complete(server, seed=4, n=3, return_token_ids=True)["choices"]
    assert several[1]["token_ids"] == tokens, "the seed of each is the next whole number"
    assert [choice["index"] for choice in several] == [0, 1, 2]
    greedy = {tuple(complete(server, temperature=0.0, return_token_ids=True)["choices"][0]["token_ids"]) for _ in "ab"}
    assert len(greedy) == 1, "without a seed too"
    as_text = complete(server, prompt="3+4=", seed=1, return_token_ids=True)
    as_ids = complete(server, prompt=tokenizer("3+4=")["input_ids"], seed=1, return_token_ids=True)
    assert as_text["choices"] == as_ids["choices"]
    (cut,) = complete(server, seed=5, max_tokens=1, return_token_ids=True)["choices"]
    assert cut["token_ids"] == tokens[:1]
    (stopped,) = complete(server, seed=5, stop_token_ids=[tokens[1]], return_token_ids=True)["choices"]
    assert stopped["token_ids"] == tokens[: 1 + tokens.index(tokens[1])]
    assert stopped["finish_reason"] == "stop"
    (stopped,) = complete(server, seed=5, stop=[tokenizer.decode(tokens[:2])], return_token_ids=True)["choices"]
    assert stopped["token_ids"] == tokens[:2]

    assert ask(server, "/health", None, "GET") == (200, {})
    (model,) = ask(server, "/v1/models", None, "GET")[1]["data"]
    assert (model["id"], model["max_model_len"]) == ("policy", tiny_model[0].config.max_position_embeddings)


REFUSED = {
    "another model": ({"model": "gpt"}, 404, "there is no model 'gpt'; there is 'policy'"),
    "streaming": ({"stream": True}, 400, "stream is not there"),
    "a penalty": ({"repetition_penalty": 1.1}, 400, "repetition_penalty is not there: leave it at 1"),
    "no prompt": ({"prompt": []}, 400, "prompt must be a text, or a list of token ids from 0 to "),
    "a token that is none": ({"prompt": [3, 10**6]}, 400, "prompt must be"),
    "a prompt of truths": ({"prompt": [True]}, 400, "prompt must be"),
    "several prompts": ({"prompt": [[3], [4]]}, 400, "prompt must be"),
    "too long": ({"max_tokens": 10**6}, 400, "prompt and response have 2 + 1000000 tokens, and the model has"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens must be between 1 and"),
    "too many": ({"n": 1000}, 400, "n must be between 1 and 256"),
    "a seed of 65 bits": ({"seed": 2**63}, 400, "seed must be between"),
    "a temperature that is none": ({"temperature": float("nan")}, 400, "temperature must be between"),
    "a whole number without end": ({"temperature": 10**400}, 400, "temperature must be between"),
    "top_p": ({"top_p": 0}, 400, "top_p must be between"),
    "stops": ({"stop": ["a", ""]}, 400, "stop must be a string or a list of them"),
    "stop ids": ({"stop_token_ids": [-1]}, 400, "stop_token_ids must be a list of token ids"),
}  # fmt: skip


def test_what_it_cannot_do_it_refuses(server):
    wrong = {}
    for name, (body, status, text) in REFUSED.items():
        found, answer = ask(server, "/v1/completions", {"prompt": [3, 4], "max_tokens": 4} | body)
        if found != status or text not in answer["error"]["message"]:
            wrong[name] = found, answer
    assert not wrong
    for content in (b"{", b"[]", b"[" * 100_000):
        assert ask(server, "/v1/completions", content)[0] == 400
    assert ask(server, "/v1/chat/completions", {})[0] == 404
    assert ask(server, "/etc/passwd", None, "GET")[0] == 404
    assert ask(server, "/update_weights_from_disk", {}, kind="text/plain")[0] == 415
    for length, status in (("", b"411"), ("Content-Length: 5000000\r\n", b"413"), ("Content-Length: -1\r\n", b"411")):
        with socket.create_connection(urllib.parse.urlsplit(server.url).netloc.split(":"), timeout=20) as raw:
            raw.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{JSON}\r\n{length}\r\n".encode())
            assert status in raw.recv(64), length
    assert complete(server)["choices"], "it goes on"


def test_it_takes_other_weights_and_keeps_its_own_if_they_do_not_fit(tiny_checkpoint, tiny_model, tmp_path):
    model, params = tiny_model
    base = open_base_model(ModelConfig(path=str(tiny_checkpoint)))
    flat = jax.tree.map(np.zeros_like, params)
    base.export(tmp_path / "flat", flat, dtype="float32", compare=False)
    (tmp_path / "empty").mkdir()
    body = {"seed": 1, "logprobs": 0, "return_token_ids": True}
    with served(tiny_checkpoint) as server:
        before = complete(server, **body)
        for path in ("empty", "nowhere"):
            status, answer = ask(server, "/update_weights_from_disk", {"model_path": str(tmp_path / path)})
            assert status == 400
            assert f"model_path={tmp_path / path} is not loaded" in answer["error"]["message"]
        assert ask(server, "/update_weights_from_disk", {})[0] == 400
        assert complete(server, **body)["choices"] == before["choices"]
        loaded = {"model_path": str(tmp_path / "flat"), "weight_version": "7", "flush_cache": True}
        status, answer = ask(server, "/update_weights_from_disk", loaded)
        assert (status, answer["success"], answer["weight_version"]) == (200, True, "7")
        after = complete(server, **body)
    assert after["metadata"] == {"weight_version": "7"}
    known = model.config.num_tokens
    np.testing.assert_allclose(after["choices"][0]["logprobs"]["token_logprobs"], -np.log(known), rtol=1e-5)


def test_it_ends_whatever_is_going_on(tiny_checkpoint):
    with served(tiny_checkpoint) as server:
        waiting = threading.Event()
        original = server._engine._do
        server._engine._do = lambda work: (waiting.set(), wait_for(lambda: server._http.closed), original(work))[2]
        failures = []

        def client():
            try:
                complete(server)
            except (OSError, http.client.HTTPException) as error:
                failures.append(error)

        thread = threading.Thread(target=client)
        thread.start()
        assert waiting.wait(20)
        server.close()
        thread.join(20)
        assert failures, "whoever was waiting hears of it"
        with pytest.raises(OSError, match="refused"):
            ask(server, "/health", None, "GET")
        server.close = lambda: None


@pytest.mark.slow  # a process that starts JAX
def test_the_command(tiny_checkpoint):
    """It says where it is, serves, and ends at a signal."""
    command = [sys.executable, "-m", "experiments.serve", f"--model={tiny_checkpoint}", "--name=policy", "--port=0"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        (url,) = re.findall(r"^serving policy at (http://127.0.0.1:\d+); Ctrl-C ends it$", line)
        there = types.SimpleNamespace(url=url)
        assert complete(there)["model"] == "policy"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
