"""The door over a real process: driven by the OpenAI client, by curl, and by clients that mean no good."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import openai
import pytest
import torch

from mycel.door.guessing import open_edge
from mycel.errors import GenerationError, RunError
from mycel.generation.request import Request, Sampling, Token
from mycel.generation.speculation import Proposal
from mycel.models.base import Base
from mycel.report import write_serving_report
from mycel.serve.edge_draft import question
from small_models import greedy_text, micro, server, write_adapter_folder

PROMPT = "def add(first, second):\n    "
KEY = "open-sesame"


@dataclass
class Place:
    """A running server, the base it serves, and the shelf of its adapters."""

    address: str
    base: Base
    shelf: Path
    client: openai.OpenAI
    log: Path

    def post(self, path: str, content: bytes | str, **headers: str) -> httpx.Response:
        known = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
        return httpx.post(f"{self.address}{path}", content=content, headers=known, timeout=120)

    def gauge(self, name: str) -> float:
        text = httpx.get(f"{self.address}/metrics", timeout=60).text
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    base = micro()
    shelf = tmp_path_factory.mktemp("shelf")
    write_adapter_folder(base, shelf / "first" / "model" / "adapter", seed=1)
    log = tmp_path_factory.mktemp("log")
    options = ["--adapters", str(shelf), "--api-key", KEY, "--requests", "24", "--memory", "8MiB", "--log", str(log)]
    with server("micro", *options) as address, openai.OpenAI(base_url=f"{address}/v1", api_key=KEY) as client:
        yield Place(address, base, shelf, client.with_options(max_retries=0), log)


def test_openai_client_gets_the_greedy_text_whole_and_streamed(place: Place) -> None:
    asked: dict[str, Any] = {"model": "micro", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = place.client.completions.create(**asked)
    assert whole.choices[0].text == greedy_text(place.base, PROMPT, 24)
    assert whole.usage is not None
    prompt = len(place.base.tokenizer(PROMPT)["input_ids"])
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, 24)
    pieces = list(place.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage == whole.usage


def test_chat_streams_and_says_who_speaks(place: Place) -> None:
    messages: Any = [{"role": "system", "content": "You write code."}, {"role": "user", "content": "add two"}]
    asked: dict[str, Any] = {"model": "micro", "messages": messages, "max_tokens": 12, "temperature": 0}
    whole = place.client.chat.completions.create(**asked)
    pieces = list(place.client.chat.completions.create(**asked, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert said == whole.choices[0].message.content
    text = "You write code.\nUser: add two\nAssistant:"
    assert said == greedy_text(place.base, text, 12).partition("\nUser:")[0]


def test_a_stop_text_ends_the_answer_and_is_not_in_it(place: Place) -> None:
    full = greedy_text(place.base, PROMPT, 40)
    stop = full[len(full) // 2 : len(full) // 2 + 4]
    asked: dict[str, Any] = {"model": "micro", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stop": [stop]}
    whole = place.client.completions.create(**asked)
    assert whole.choices[0].text == full.partition(stop)[0]
    assert whole.choices[0].finish_reason == "stop"
    streamed = "".join(piece.choices[0].text for piece in place.client.completions.create(**asked, stream=True))
    assert streamed == whole.choices[0].text


def test_a_seed_repeats_and_choices_differ(place: Place) -> None:
    asked: dict[str, Any] = {"model": "micro", "prompt": PROMPT, "max_tokens": 12, "temperature": 1.0, "n": 3}
    first = [choice.text for choice in place.client.completions.create(**asked, seed=7).choices]
    again = [choice.text for choice in place.client.completions.create(**asked, seed=7).choices]
    other = [choice.text for choice in place.client.completions.create(**asked, seed=8).choices]
    assert first == again != other
    assert len(set(first)) > 1


def test_logprobs_are_the_models_own(place: Place) -> None:
    import torch

    asked: dict[str, Any] = {"model": "micro", "prompt": PROMPT, "max_tokens": 5, "temperature": 0}
    found = place.client.completions.create(**asked, logprobs=3).choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    ids = place.base.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    scores = torch.log_softmax(place.base.model(ids).logits[0, -1], -1)
    assert found.token_logprobs[0] == pytest.approx(float(scores.max()), abs=1e-4)
    assert sorted(found.top_logprobs[0].values()) == pytest.approx(sorted(scores.topk(3).values.tolist()), abs=1e-4)
    chat = place.client.chat.completions.create(
        model="micro",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=3,
        seed=1,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True},
    )
    assert chat.choices[0].logprobs is not None
    assert [len(token.top_logprobs) for token in chat.choices[0].logprobs.content or []] == [2, 2, 2]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # peft asks transformers by the older name
def test_adapters_answer_together_each_as_merged_by_peft(place: Place) -> None:
    write_adapter_folder(place.base, place.shelf / "second", seed=2)  # appears while the server runs
    names = [model.id for model in place.client.models.list()]
    assert names == ["micro", "micro:first", "micro:second"]
    folders = {
        "micro": [],
        "micro:first": [place.shelf / "first/model/adapter"],
        "micro:second": [place.shelf / "second"],
    }

    def ask(name: str) -> str:
        return place.client.completions.create(model=name, prompt=PROMPT, max_tokens=24, temperature=0).choices[0].text

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(ask, [*folders, *folders]))
    wanted = [greedy_text(place.base, PROMPT, 24, merged) for merged in folders.values()]
    assert answers == [*wanted, *wanted]
    assert len(set(wanted)) == 3, "the adapters change nothing"


def test_curl_streams(place: Place) -> None:
    body = json.dumps({"model": "micro", "prompt": "import ", "max_tokens": 5, "stream": True, "temperature": 0})
    curl = shutil.which("curl")
    assert curl is not None
    command = [curl, "-sN", f"{place.address}/v1/completions", "-H", f"Authorization: Bearer {KEY}", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    text = "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-2])
    assert text == greedy_text(place.base, "import ", 5)


def test_health_and_metrics_need_no_key_and_the_rest_does(place: Place) -> None:
    assert httpx.get(f"{place.address}/health", timeout=60).json()["status"] == "ok"
    assert place.gauge("mycel_pages") > 0
    for key in ("none", "wrong", "open-sesam", "open-sesame-", "ключ"):
        answer = httpx.get(
            f"{place.address}/v1/models", headers={b"Authorization": f"Bearer {key}".encode()}, timeout=60
        )
        assert answer.status_code == 401
        assert "key" in answer.json()["error"]["message"]


BAD = {
    "not JSON": (b"{", 400),
    "broken UTF-8": (b'{"model": "micro", "prompt": "\xff\xfe"}', 400),
    "an array": (b"[1]", 400),
    "endless nesting": (b"[" * 100_000, 400),
    "no prompt": (b'{"model": "micro"}', 400),
    "an unknown model": (b'{"model": "gpt-9", "prompt": "x"}', 404),
    "an unknown adapter": (b'{"model": "micro:../../etc", "prompt": "x"}', 404),
    "absurd temperature": (b'{"model": "micro", "prompt": "x", "temperature": 1e308}', 400),
    "infinite temperature": (b'{"model": "micro", "prompt": "x", "temperature": Infinity}', 400),
    "not a number": (b'{"model": "micro", "prompt": "x", "top_p": NaN}', 400),
    "no probability": (b'{"model": "micro", "prompt": "x", "top_p": 0}', 400),
    "negative tokens": (b'{"model": "micro", "prompt": "x", "max_tokens": -5}', 400),
    "tokens beyond the context": (b'{"model": "micro", "prompt": "x", "max_tokens": 1000000}', 400),
    "a huge seed": (b'{"model": "micro", "prompt": "x", "seed": 1e400}', 400),
    "too many choices": (b'{"model": "micro", "prompt": "x", "n": 1000}', 400),
    "token ids out of range": (b'{"model": "micro", "prompt": [1, 99999999]}', 400),
    "negative token ids": (b'{"model": "micro", "prompt": [-1]}', 400),
    "an empty prompt list": (b'{"model": "micro", "prompt": []}', 400),
    "an empty stop": (b'{"model": "micro", "prompt": "x", "stop": [""]}', 400),
    "tools": (b'{"model": "micro", "prompt": "x", "tools": [{}]}', 400),
    "a long prompt": (json.dumps({"model": "micro", "prompt": "word " * 5000}).encode(), 400),
    "a body too large": (b'{"model": "micro", "prompt": "' + b"x" * (5 << 20) + b'"}', 413),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_bodies_are_refused_with_a_sentence(place: Place, kind: str) -> None:
    content, status = BAD[kind]
    answer = place.post("/v1/completions", content)
    assert answer.status_code == status
    assert len(answer.json()["error"]["message"]) > 20


def test_an_empty_prompt_and_half_a_surrogate_are_answered_or_refused_but_never_crash(place: Place) -> None:
    for prompt in ('""', '"\\ud800"', '"\\u0000"', '"🦊🦊"'):
        answer = place.post("/v1/completions", f'{{"model": "micro", "prompt": {prompt}, "max_tokens": 2}}')
        assert answer.status_code in (200, 400), answer.text
        answer.json()


def test_a_client_that_vanishes_gives_everything_back(place: Place) -> None:
    where = urlparse(place.address)
    _until(lambda: place.gauge("mycel_unfinished_requests") == 0)
    for streams in (True, False):
        asked = {"model": "micro", "prompt": "x = ", "max_tokens": 900, "ignore_eos": True, "stream": streams}
        body = json.dumps(asked)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        sent = f"{head}Content-Length: {len(body)}\r\n\r\n{body}"
        for _ in range(4):
            with socket.create_connection((where.hostname or "", where.port or 0)) as connection:
                begun = place.gauge("mycel_iterations")
                connection.sendall(sent.encode())
                if streams:
                    assert b"200 OK" in connection.recv(4096)
                else:  # a count that only rises: work that is under way may have ended when one looks
                    _until(lambda begun=begun: place.gauge("mycel_iterations") > begun)
        _until(lambda: place.gauge("mycel_unfinished_requests") == 0 and place.gauge("mycel_pages_held") == 0)


def test_more_load_than_capacity_is_told_when_to_come_back(place: Place) -> None:
    body = json.dumps({"model": "micro", "prompt": "x = ", "max_tokens": 300, "ignore_eos": True})
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(place.post("/v1/completions", body))

    threads = [threading.Thread(target=ask) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert sum(answer.status_code == 200 for answer in answers) >= 24
    _until(lambda: place.gauge("mycel_pages_held") == 0)


def _until(holds: Any, patience: float = 60.0) -> None:
    ends = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < ends, "it did not come about"
        time.sleep(0.02)


def test_a_remote_server_is_handed_on_to_behind_keys_of_its_own(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYCEL_REMOTE_KEY", KEY)
    with server("any", "--engine", "vllm", "--remote", place.address, "--api-key", "other") as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="other", max_retries=0) as client:
            asked: dict[str, Any] = {"model": "micro", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
            pieces = list(client.completions.create(**asked, stream=True))
            assert "".join(piece.choices[0].text for piece in pieces) == greedy_text(place.base, PROMPT, 12)
            with pytest.raises(openai.NotFoundError, match="not served"):
                client.completions.create(**{**asked, "model": "none"})
        # Eight choices: their work takes longer than a busy machine needs to see it, leave it and hear of that.
        left, content = place.gauge("mycel_cancelled_total"), {"model": "micro", "prompt": "x", "max_tokens": 900}
        body, begun = json.dumps({**content, "n": 8, "ignore_eos": True}), place.gauge("mycel_iterations")
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer other\r\nContent-Length: {len(body)}"
        with socket.create_connection((urlparse(address).hostname or "", urlparse(address).port or 0)) as connection:
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            _until(lambda: place.gauge("mycel_iterations") > begun)
        _until(lambda: place.gauge("mycel_cancelled_total") > left)
        with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=f"{address}/v1", api_key=KEY) as wrong:
            wrong.models.list()


def test_ranks_read_weights_and_a_draft_guesses_behind_the_door_for_the_same_text(place: Place) -> None:
    options = ["--tensor-parallel", "2", "--weights", "tiered(1)", "--speculate", "draft:micro"]
    with server("micro", *options) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="-") as client:
        asked: dict[str, Any] = {"model": "micro", "max_tokens": 24, "temperature": 0}
        with ThreadPoolExecutor(3) as threads:
            prompts = [PROMPT, "import ", "class Name:\n"]
            answers = list(threads.map(lambda prompt: client.completions.create(prompt=prompt, **asked), prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.choices[0].text == greedy_text(place.base, prompt, 24)
        metrics = httpx.get(f"{address}/metrics", timeout=60).text
        steps = float(metrics.partition("\nmycel_iterations ")[2].split()[0])
        assert steps < 3 * 24 / 2, "nothing was guessed"
        for span in ("parse", "tokenise", "enter", "queue", "prefill", "decode", "detokenise", "send"):
            assert f'mycel_span_seconds_count{{span="{span}"}} 3.0' in metrics
        total = sum(float(line.split()[-1]) for line in metrics.splitlines() if "mycel_span_seconds_sum" in line)
        whole = float(metrics.partition("\nmycel_request_seconds_sum ")[2].split()[0])
        assert total >= whole, "the spans leave out a part of the way"


def test_an_edge_drafts_and_the_door_verifies(place: Place) -> None:
    served = open_edge("micro", place.address, KEY, 4, guesses=6)
    ids = tuple(place.base.tokenizer(PROMPT)["input_ids"])

    def ask(sampling: Sampling, most: int = 24) -> tuple[str, list[int]]:
        async def read() -> list[Token]:
            request = Request(ids, most, sampling, ends=served.ends)
            return [token async for token in served.backend.stream(request)]

        tokens = asyncio.run(read())
        return "".join(token.text for token in tokens), [token.id for token in tokens]

    try:
        before = place.gauge("mycel_iterations")
        assert ask(Sampling())[0] == greedy_text(place.base, PROMPT, 24)
        assert place.gauge("mycel_iterations") - before <= 24 / 4, "guesses of the same model were refused"
        drawn = Sampling(1.0, seed=11)
        assert ask(drawn) == ask(drawn) != ask(Sampling(1.0, seed=12))
        free = ask(Sampling(0.8, top_p=0.9), 40)[1]  # without a seed any token may come, one that ends the text too
        assert len(free) == 40 or free[-1] in served.ends
        _until(lambda: place.gauge("mycel_pages_held") == 0)  # given back behind the last token
    finally:
        served.backend.close()
    with pytest.raises(GenerationError, match="needs a key"):
        open_edge("micro", place.address, "wrong", 1)
    with pytest.raises(GenerationError, match="cannot be reached"):
        open_edge("micro", "http://127.0.0.1:9", "", 1)


def _question(**changes: Any) -> bytes:
    return question([5, 6, 7], Proposal((8, 9), changes.pop("rows", None)), Sampling(), changes.pop("model", "micro"))


LIES = {
    "an unknown model": (_question(model="gpt-9"), 404),
    "nothing": (b"", 400),
    "garbage": (b"\x07" * 900, 400),
    "JSON": (b'{"model": "micro"}', 400),
    "rows of another vocabulary": (_question(rows=torch.ones(2, 5) / 5), 400),
    "rows that are no distribution": (_question(rows=torch.ones(2, 2048)), 400),
    "rows that are no numbers": (_question(rows=torch.full((2, 2048), float("nan"))), 400),
    "no tokens": (question([], Proposal(()), Sampling(), "micro"), 400),
    "tokens of another vocabulary": (question([5, 1 << 40], Proposal(()), Sampling(), "micro"), 400),
    "too many guesses": (question([5], Proposal((6,) * 40), Sampling(), "micro"), 400),
    "more than the context": (question([5] * 5000, Proposal((6,)), Sampling(), "micro"), 400),
    "too long": (b"\x00" * (5 << 20), 413),
}


@pytest.mark.parametrize("lie", LIES)
def test_bad_questions_are_refused_with_a_sentence(place: Place, lie: str) -> None:
    frame, status = LIES[lie]
    answer = place.post("/v1/speculation", frame)
    assert answer.status_code == status
    assert len(answer.json()["error"]["message"]) > 20
    assert place.post("/v1/speculation", frame, Authorization="none").status_code == 401


def test_the_report_tells_what_the_journal_holds_and_nothing_that_was_said(place: Place) -> None:
    for _ in range(2):
        place.post("/v1/completions", json.dumps({"model": "micro", "prompt": "secret = ", "max_tokens": 3}))
    page = write_serving_report(place.log).read_text(encoding="utf-8")
    written = [json.loads(line) for line in (place.log / "requests.jsonl").read_text().splitlines()]
    lines = [line for line in written if "event" not in line]
    assert {"opened", "state", "refused"} <= {line.get("event") for line in written}
    assert f"{len(lines):,} requests" in page
    assert f"{sum(line['generated'] for line in lines):,} tokens" in page
    assert page.count("<svg") == 6
    assert "came when all places were taken" in page
    assert "secret" not in page + str(written)
    with (place.log / "requests.jsonl").open("a") as journal:
        journal.write('{"arrived": ')  # cut off by a crash
    assert write_serving_report(place.log).is_file()


@pytest.mark.parametrize("content", ["", "[]\n[]\n", '{"arrived": NaN}\n{}\n', "\x00\n\x00\n"])
def test_a_damaged_journal_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "requests.jsonl").write_text(content)
    with pytest.raises(RunError):
        write_serving_report(tmp_path)
