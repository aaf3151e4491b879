"""The built-in `judge` against a local server that counts requests, fails, and replies as real ones do."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import records

from rlft.config.data import Reward
from rlft.errors import RewardError
from rlft.rewards.builtin import judge as judge_file
from rlft.rewards.builtin.judge import judge
from rlft.rewards.score import build_rewards, score
from rlft.types import FinishReason, Prompt, Rollout


class Server(ThreadingHTTPServer):
    """Replies with a score that the question asks for: "say X" gets the reply X; "fail N" gets N errors first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[dict[str, Any], str]] = []
        self.failures: dict[str, int] = {}
        self.active = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.requests.append((body, self.headers["Authorization"]))
            self.server.active += 1
            self.server.most = max(self.server.most, self.server.active)
            left = self.server.failures.setdefault(text, int(text.split()[1]) if text.startswith("fail") else 0)
            self.server.failures[text] = left - 1
        time.sleep(0.05)
        with self.server.lock:
            self.server.active -= 1
        assert self.path == "/v1/chat/completions"
        code = 401 if text.startswith("denied") else 503 if left > 0 else 200
        reply = text.partition("say ")[2] if "say " in text else "Score: 5"
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [message],
            "usage": usage,
        }
        data = json.dumps(answer if code == 200 else {"error": {"message": f"no {text}"}}).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    judge_file._replies.clear()
    judge_file._totals.update(dict.fromkeys(judge_file._totals, 0))
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def call(server: Server, completions: list[str], **args: Any) -> list[float]:
    given = {
        "prompt": "{completion}",
        "prompts": ["q"] * len(completions),
        "base_url": server.url,
        "model": "m",
        **args,
    }
    return asyncio.run(judge(completions=completions, **given))


def test_scores_are_scaled_and_replies_tokens_and_cost_logged(server: Server) -> None:
    metrics: dict[str, float] = {}
    extras: dict[str, list[str]] = {}
    texts = ["say Score: 7", 'say {"reason": "score: 1", "score": 10}', "say **Score:** 2.5"]
    values = call(
        server, texts, usd_per_million=[1.0, 10.0], log_metric=metrics.__setitem__, log_extra=extras.__setitem__
    )
    assert values == [0.7, 1.0, 0.25]
    tokens = {"judge/requests": 3, "judge/prompt_tokens": 30, "judge/completion_tokens": 6}
    assert metrics == {**tokens, "judge/usd": pytest.approx(90e-6)}
    assert extras == {"reply": [text.removeprefix("say ") for text in texts]}
    assert server.requests[0][0]["temperature"] == 0 and server.requests[0][0]["model"] == "m"


def test_identical_requests_are_sent_once(server: Server) -> None:
    assert call(server, ["say score: 3"] * 8 + ["say score: 4"]) == [0.3] * 8 + [0.4]
    assert call(server, ["say score: 3"]) == [0.3] and len(server.requests) == 2
    assert call(server, ["say score: 3"], options={"temperature": 1}) == [0.3] and len(server.requests) == 3


def test_the_template_takes_prompt_completion_and_columns(server: Server) -> None:
    chat = [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2"}]]
    template = 'Reply {"score": N}. {prompt} | {answer} | {completion} say score: {level}'
    assert call(server, ["4"], prompts=chat, prompt=template, answer=[4], level=[6]) == [0.6]
    asked = server.requests[0][0]["messages"][0]["content"]
    assert asked == 'Reply {"score": N}. system: be brief\n\nuser: 2+2 | 4 | 4 say score: 6'
    with pytest.raises(ValueError, match=r"prompt asks for \{solution\}, and there is no such column; there are"):
        call(server, ["4"], prompt="{solution}")


def test_requests_are_repeated_and_few_at_a_time(server: Server) -> None:
    assert call(server, [f"fail 2 {i}" for i in range(12)], concurrency=3) == [0.5] * 12
    assert len(server.requests) == 36 and server.most <= 3


def test_a_request_that_keeps_failing_raises_and_the_others_are_kept(server: Server) -> None:
    with pytest.raises(Exception, match="no fail 99"):
        call(server, ["say score: 1", "fail 99"], retries=1)
    assert len(server.requests) == 3
    assert call(server, ["say score: 1"]) == [0.1] and len(server.requests) == 3


@pytest.mark.parametrize(("text", "what"), [("say well done", "has no score"), ("say score: 11", "is not within")])
def test_a_reply_without_a_usable_score_raises(server: Server, text: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        call(server, [text])


def test_the_key_comes_from_the_environment_and_its_absence_names_env(server: Server, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    call(server, ["a"], api_key="env:JUDGE_KEY")
    call(server, ["b"], api_key="literal")
    call(server, ["c"])
    assert [key for _, key in server.requests] == ["Bearer secret", "Bearer literal", "Bearer none"]
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match=r'no variable JUDGE_KEY; .* pass it on with env = \["JUDGE_KEY"\]'):
        call(server, ["d"], api_key="env:JUDGE_KEY")


def rollouts(texts: list[str]) -> list[Rollout]:
    prompt = Prompt((1,), {"prompt": "q"}, 0)
    return [Rollout(prompt, (1,), (True,), None, text, FinishReason.STOP, i, 0, 0) for i, text in enumerate(texts)]


def test_judge_by_name_in_its_worker_leaves_the_row_at_fault_out_and_asks_once(server: Server) -> None:
    args = {"base_url": server.url, "model": "m", "prompt": "{completion}"}
    (function,) = build_rewards([Reward("judge", args=args)])
    try:
        texts = [f"say score: {i}" for i in range(7)] + ["say nothing"]
        _, parts = score(rollouts(texts), [function], {})
    finally:
        function.close()
    assert parts.outcomes["judge"].invalid == [False] * 7 + [True]
    assert records.columns(parts)["judge"][:7] == pytest.approx([i / 10 for i in range(7)])
    assert len(server.requests) == 8, "what is scored again after the fault comes from the cache"
    assert "the judge's reply has no score" in parts.faults()[0]


def test_a_refused_key_stops_the_first_call(server: Server) -> None:
    args = {"base_url": server.url, "model": "m", "prompt": "{completion}"}
    (function,) = build_rewards([Reward("judge", args=args)])
    try:
        with pytest.raises(RewardError, match="no denied"):
            score(rollouts(["denied"]), [function], {})
    finally:
        function.close()
