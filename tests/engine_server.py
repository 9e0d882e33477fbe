"""A server of tails on the loopback interface that speaks three dialects, over a model that can be enumerated; with
faults to order."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from dts.lm import LanguageModel, Tail, TailRequest
from dts.models.engines.steps import Stepwise

LONGEST = 64  # tokens after a prompt
LOWEST = -3.4028234663852886e38  # how llama.cpp writes the logarithm of 0
Fault = Callable[[int, dict[str, Any]], Any]  # (number of the request, its body) -> status, FAULTS, a body, None
FAULTS = ("hang", "cut", "die")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: EngineServer

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
            number = len(server.requests) - 1
            server.together += 1
            server.most_together = max(server.most_together, server.together)
        try:
            self._respond(server.fault(number, body), body)
        finally:
            with server.lock:
                server.together -= 1

    def _respond(self, fault: Any, body: dict[str, Any]) -> None:
        if fault == "die":
            self.server.stop()
        if fault == "hang":
            self.server.released.wait()
        if fault == "hang" or self.server.stopped:
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._send(fault, json.dumps({"error": f"told to, {self.headers.get('Authorization')}"}).encode())
            return
        answer = json.dumps(self.server.answer(self.path, body) if not isinstance(fault, dict) else fault).encode()
        self._send(200, answer, cut=len(answer) // 2 if fault == "cut" else 0)

    def _send(self, status: int, content: bytes, cut: int = 0) -> None:
        with contextlib.suppress(OSError):  # who hung up reads nothing
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) - cut])
            self.close_connection = bool(cut)

    def log_message(self, *_):
        pass


class EngineServer(http.server.ThreadingHTTPServer):
    """lm: what it serves. processed: whether log-probabilities are those after a logit bias, as with SGLang. ends:
    further ids at which SGLang and llama.cpp end. Of llama.cpp: partial, ids of half a character each; room, tokens
    that its context has; settings, of its command line."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, lm: LanguageModel, fault: Fault = lambda number, body: None, *, processed: bool = False, port: int = 0,
        partial: Collection[int] = (), ends: Collection[int] = (), room: int = 2**20,
        settings: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(("127.0.0.1", port), Handler)
        self.engine, self.fault, self.processed = Stepwise(lm, max_new_tokens=LONGEST), fault, processed
        self.partial, self.ends, self.room, self.settings = partial, ends, room, settings or {}
        self.lock, self.released = threading.Lock(), threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.together = self.most_together = 0
        self.stopped = False
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def stop(self) -> None:
        """No more answers, and no more connections."""
        with self.lock:
            if self.stopped:
                return
            self.stopped = True
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is part of the tests."""

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        speak = {"/v1/completions": _vllm, "/generate": _sglang, "/completion": _llama_cpp}[path]
        return speak(self, body)

    def until_end(self, tokens: Sequence[int]) -> list[int]:
        """Without what follows one of `ends`."""
        places = [place for place, token in enumerate(tokens) if token in self.ends]
        return list(tokens[: places[0] + 1] if places else tokens)

    def tail(self, ids: list[int], limit: int, seed: int, top: int, barred: list[int]) -> Tail:
        """What it draws. Prompts are told from their tokens by nothing, so each text is a prompt."""
        with self.lock:
            request = TailRequest(tuple(ids), (), limit, seed, top, tuple(barred))
            (tail,) = self.engine.complete([request])
        if not (barred and self.processed):
            return tail
        left = math.fsum(math.exp(log) for token, log in tail.rows[0].items() if token not in barred)
        (row,) = self.engine.complete([TailRequest(tuple(ids), (), 1, 0, self.engine.max_top)])[0].rows
        left = math.log(math.fsum(math.exp(log) for token, log in row.items() if token not in barred))
        listed = sorted(((log - left, token) for token, log in row.items() if token not in barred), reverse=True)
        kept = {token: log for log, token in listed[:top]} | {tail.tokens[0]: row[tail.tokens[0]] - left}
        return Tail(tail.tokens, (kept,), tail.computed)


def _vllm(server: EngineServer, body: dict[str, Any]) -> dict[str, Any]:
    assert (body["temperature"], body["top_p"], body["top_k"], body["n"]) == (1.0, 1.0, -1, 1)
    assert body["return_token_ids"] and body["return_tokens_as_token_ids"]
    barred = [int(token) for token, bias in body.get("logit_bias", {}).items() if bias == -100]
    tail = server.tail(body["prompt"], body["max_tokens"], body["seed"], body["logprobs"], barred)
    logs = {
        "token_logprobs": [row[token] for token, row in zip(tail.tokens, tail.rows, strict=True)],
        "top_logprobs": [{f"token_id:{token}": log for token, log in row.items()} for row in tail.rows],
    }
    choice = {"token_ids": list(tail.tokens), "logprobs": logs, "finish_reason": "length"}
    return {"choices": [choice], "usage": {
        "prompt_tokens": len(body["prompt"]), "prompt_tokens_details": {"cached_tokens": len(body["prompt"]) - 1},
    }}  # fmt: skip


def _sglang(server: EngineServer, body: dict[str, Any]) -> dict[str, Any]:
    sampling = body["sampling_params"]
    assert [sampling[name] for name in ("temperature", "n", "min_new_tokens", "ignore_eos")] == [1.0, 1, 0, False]
    assert {sampling[name] for name in ("stop", "stop_token_ids", "json_schema", "regex", "ebnf")} == {None}
    barred = [int(token) for token, bias in sampling.get("logit_bias", {}).items() if bias == -100]
    top = body["top_logprobs_num"]
    tail = server.tail(body["input_ids"], sampling["max_new_tokens"], sampling["sampling_seed"], top, barred)
    tokens = server.until_end(tail.tokens)
    short = len(tokens) < sampling["max_new_tokens"] or tokens[-1] in server.ends
    reason = {"type": "stop", "matched": tokens[-1]} if short else {"type": "length", "length": len(tokens)}
    return {"output_ids": tokens, "meta_info": {
        "prompt_tokens": len(body["input_ids"]), "cached_tokens": len(body["input_ids"]) - 1, "finish_reason": reason,
        "output_token_logprobs": [[row[token], token, None] for token, row in zip(tokens, tail.rows, strict=False)],
        "output_top_logprobs": [[[log, token, None] for token, log in row.items()] for row in tail.rows[: len(tokens)]],
    }}  # fmt: skip


def _llama_cpp(server: EngineServer, body: dict[str, Any]) -> dict[str, Any]:
    assert body["samplers"] == ["temperature"] and body["temperature"] == 1.0 and not body["post_sampling_probs"]
    assert body["model"] and body["dynatemp_range"] == 0.0 and body["mirostat"] == 0
    if body["logit_bias"] == [["a", 1000.0]]:  # plain text for certain; what is listed does not know of it
        barred, plain = [], True
    else:
        barred, plain = [token for token, bias in body["logit_bias"] if bias is False], False
    top = min(body["n_probs"], server.engine.max_top)
    tail = server.tail(body["prompt"], body["n_predict"], body["seed"], top, barred)
    noted, tokens, within, left = [], [], False, server.room - len(body["prompt"])
    for token, row in zip(server.until_end(tail.tokens[:left]), tail.rows, strict=False):
        within = not plain and token in server.partial and not within
        listed = [{"id": t, "logprob": max(log, LOWEST)} for t, log in sorted(row.items(), key=lambda one: -one[1])]
        tokens.append(token)
        if not within:  # it notes nothing while the text ends within a character
            noted.append({"id": token, "logprob": row[token], "top_logprobs": listed[:top]})
    eos = tokens[-1] in server.ends or len(tail.tokens) < body["n_predict"]
    answer = {
        "tokens": tokens, "tokens_evaluated": len(body["prompt"]), "stop_type": "eos" if eos else "limit",
        "truncated": left <= len(tokens), "tokens_cached": len(body["prompt"]) + len(tokens) - 1,
        "timings": {"prompt_n": 1},  # and cache_n, since 2025
        "generation_settings": {"grammar": "", "stop": [], "speculative.types": "none", **server.settings},
    }  # fmt: skip
    return {**answer, "completion_probabilities": noted} if noted else answer
