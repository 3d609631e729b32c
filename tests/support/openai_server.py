"""An OpenAI-style server on the loopback interface, which answers from a real model through its chat template."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import torch
from transformers import RepetitionPenaltyLogitsProcessor


class RequestError(Exception):
    """The server answers a request with this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(kw_only=True)
class OpenAIServer:
    """A model with its tokenizer behind the API, what the server can do, and the requests that it got.

    `shows_ids` is the kind of server whose requests for token ids it takes. `change` changes each answer to a chat.
    `faults` has the answer of each path that does not work: a status, the bytes of a body, or seconds of silence.
    """

    model: Any
    tokenizer: Any
    stops: list[int]
    names: list[str] = field(default_factory=lambda: ['tiny'])
    key: str = ''
    shows_ids: Literal['vllm', 'llama.cpp'] | None = None
    gives_logprobs: bool | None = True
    gives_usage: bool = True
    repetition_penalty: float = 1.0
    completes: Literal['ids', 'text'] | None = 'ids'
    change: Callable[[dict[str, Any]], None] | None = None
    faults: dict[str, int | bytes | float] = field(default_factory=dict)
    refused_words: str | None = None
    requests: list[tuple[str, Any, str]] = field(default_factory=list)
    url: str = ''

    def answer(self, path: str, body: Any, authorization: str) -> Any:
        """Return the answer to a request. Raises RequestError for a status other than 200."""
        self.requests.append((path, body, authorization))
        if self.key and authorization != f'Bearer {self.key}':
            raise RequestError(401, f'no such key: {authorization}')
        if path == '/v1/models':
            return {'data': [{'id': name, 'object': 'model'} for name in self.names]}
        if path == '/v1/chat/completions':
            return self._chat(body)
        if path == '/v1/completions' and self.completes:
            return self._completion(body)
        if path == '/tokenize' and self.shows_ids == 'vllm':
            return {'tokens': self._prompt(body), 'count': len(self._prompt(body))}
        if path == '/tokenize' and self.shows_ids == 'llama.cpp':
            return {'tokens': self.tokenizer(body.get('content', ''))['input_ids']}
        if path == '/apply-template' and self.shows_ids == 'llama.cpp':
            return {'prompt': self.tokenizer.decode(self._prompt(body))}
        raise RequestError(404, 'Not Found')

    def _prompt(self, body: Any) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            body['messages'],
            tools=body.get('tools'),
            add_generation_prompt=True,
            return_dict=False,
            **body.get('chat_template_kwargs', {}),
        )
        return ids

    def _chat(self, body: Any) -> dict[str, Any]:
        if self.names and body.get('model') not in self.names:
            raise RequestError(404, f'The model `{body.get("model")}` does not exist.')
        if self.gives_logprobs is None and 'logprobs' in body:
            raise RequestError(422, 'Unexpected fields in the request: logprobs')
        if self.refused_words is not None and self.refused_words in json.dumps(body['messages']):
            raise RequestError(400, 'these words are refused')
        prompt = self._prompt(body)
        ids, first = self._generate(prompt, body['max_tokens'])
        choice: dict[str, Any] = {'message': {'role': 'assistant', 'content': self._text(ids)}}
        if self.gives_logprobs and body.get('logprobs'):
            choice['logprobs'] = {'content': [self._listed(first, ids[0], body['top_logprobs'])]}
        answer = self._answer(choice, prompt, ids, body)
        if self.change is not None:
            self.change(answer)
        return answer

    def _completion(self, body: Any) -> dict[str, Any]:
        prompt = body['prompt']
        if isinstance(prompt, str) != (self.completes == 'text'):
            raise RequestError(400, 'the prompt has a wrong type')
        prompt = self.tokenizer(prompt)['input_ids'] if self.completes == 'text' else prompt
        ids, _ = self._generate(prompt, body['max_tokens'])
        return self._answer({'text': self._text(ids)}, prompt, ids, body)

    def _answer(self, choice: dict[str, Any], prompt: list[int], ids: list[int], body: Any) -> dict[str, Any]:
        finish = 'stop' if ids[-1] in self.stops else 'length'
        usage = {'prompt_tokens': len(prompt), 'completion_tokens': len(ids)}
        answer: dict[str, Any] = {'choices': [{'index': 0, 'finish_reason': finish, **choice}]}
        return {**answer, 'usage': usage} if self.gives_usage else answer

    def _generate(self, prompt: list[int], max_tokens: int) -> tuple[list[int], torch.Tensor]:
        """Return the ids of the greedy answer with its end, and the log probabilities of its first token."""
        ids: list[int] = []
        first = None
        with torch.no_grad():
            while len(ids) < max_tokens and not (ids and ids[-1] in self.stops):
                logits = self.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1].float()
                first = torch.log_softmax(logits, dim=-1) if first is None else first
                penalise = RepetitionPenaltyLogitsProcessor(self.repetition_penalty)
                ids.append(int(penalise(torch.tensor([[*prompt, *ids]]), logits[None])[0].argmax()))
        assert first is not None, 'an answer has a token'
        return ids, first

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _listed(self, first: torch.Tensor, chosen: int, count: int) -> dict[str, Any]:
        def shown(index: int) -> dict[str, Any]:
            return {'token': self.tokenizer.decode([index]), 'logprob': float(first[index])}

        return {**shown(chosen), 'top_logprobs': [shown(index) for index in first.topk(count).indices.tolist()]}


@contextmanager
def serving(server: OpenAIServer) -> Iterator[OpenAIServer]:
    """Serve on a free port of the loopback interface until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def _answer(self) -> None:
            sent = self.rfile.read(int(self.headers.get('Content-Length') or 0))
            fault = server.faults.get(self.path)
            if isinstance(fault, float):
                time.sleep(fault)
                return
            if isinstance(fault, bytes):
                self._send(200, fault)
                return
            try:
                if fault is not None:
                    raise RequestError(fault, 'not now')
                authorization = self.headers.get('Authorization') or ''
                found = server.answer(self.path, json.loads(sent) if sent else None, authorization)
                self._send(200, json.dumps(found).encode())
            except RequestError as error:
                self._send(error.status, json.dumps({'error': {'message': str(error)}}).encode())

        def _send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            if status == 307:
                self.send_header('Location', f'{server.url}/elsewhere')
            self.send_header('Content-Type', 'application/json')
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _answer  # noqa: N815

    http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    http.daemon_threads = True
    server.url = f'http://127.0.0.1:{http.server_port}'
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
