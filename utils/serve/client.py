"""A client of an OpenAI-style server. Gets the server's list of models, its answers, and the token ids of prompts."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from utils.base.errors import ConfigError
from utils.base.leak_scan import hide_secrets
from utils.base.logger import logger

KEY_VARIABLE = 'OPENAI_API_KEY'
# The number of alternatives of the first token whose log probabilities are asked for. OpenAI allows up to 20.
TOP_LOGPROBS = 5
_ANSWER_SECONDS = 300
_OTHER_SECONDS = 30
_SHOWN_CHARACTERS = 200
_LOOPBACK = ('localhost', '127.0.0.1', '::1')


# HTTP statuses of a server that may answer the same request later.
_BUSY = (408, 429, 500, 502, 503, 504)


class Refused(Exception):
    """The server answered a request with an HTTP error. The text is the status and the message of the server."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f'HTTP {status}: {text}')
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer of a server to one prompt.

    Some servers remove the reasoning and the tool calls from the text of the answer. `reasoning` is the removed
    reasoning, and `has_calls` says whether tool calls were removed. `finish` is the finish reason. `finish`,
    `prompt_tokens` and `new_tokens` are None if the server does not give them. `first` is {token: log probability} for
    the first token of the answer and for the alternatives to it that the server lists. If the server gives no log
    probabilities, `first` is empty.
    """

    text: str
    reasoning: str = ''
    has_calls: bool = False
    finish: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    first: Mapping[str, float] = field(default_factory=dict)


def reach(address: str, model: str | None) -> Server:
    """Connect to the server at `address` and return its client. `model` is a name, or None for the only model.

    Raises ConfigError if the server does not answer in the form of the OpenAI API, or does not accept the API key. If
    `model` is None, it also raises ConfigError if the server cannot list its models, or lists several.
    """
    server = Server(address)
    server.choose_model(model)
    logger.info(f'{address}: questions go to the model {server.model or "of the server, which lists no name"}')
    return server


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error, because the API key must not reach another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Server:
    """The client of one server. The API key is read from the environment, and is never shown or stored."""

    def __init__(self, address: str) -> None:
        """Keep the address of the server. It may end in /v1."""
        self.address = address
        self.model: str | None = None
        self._root = address.rstrip('/').removesuffix('/v1')
        self._key = os.environ.get(KEY_VARIABLE) or ''
        # The proxies of the environment are for other machines.
        proxies = [urllib.request.ProxyHandler({})] if urlsplit(address).hostname in _LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)
        self._gives_logprobs = True
        self._id_forms = [self._ids_by_messages, self._ids_by_template]

    def choose_model(self, name: str | None) -> None:
        """Set the name of the model for all requests. This is `name` if it is not None.

        If `name` is None, the only model that the server lists is used. If the server lists no model, requests contain
        no model name. Raises ConfigError in the same cases as `reach`.
        """
        try:
            listed = self._listed()
        except Refused as error:
            if name is None or error.status in (401, 403):
                raise ConfigError(self._refusal(error)) from error
            listed = []
        if name is None and len(listed) > 1:
            raise ConfigError(
                f'--check_server {self.address}: the server lists {len(listed)} models: {", ".join(listed)}. Name the '
                'model to check: --served_model NAME. If `transformers serve FOLDER` started the server, NAME is '
                'FOLDER as typed in that command.'
            )
        self.model = name or next(iter(listed), None)

    def _refusal(self, error: Refused) -> str:
        if error.status in (401, 403):
            state = f'does not accept that in {KEY_VARIABLE}' if self._key else f'{KEY_VARIABLE} is not set'
            return (
                f'--check_server {self.address}: the server asks for a key, and {state} ({error}). Set the environment '
                f'variable {KEY_VARIABLE} to the key of the server.'
            )
        return (
            f'--check_server {self.address}: /v1/models answers {error}. Give the address of an OpenAI-style server, '
            'e.g. http://localhost:8000/v1, or name its model with --served_model.'
        )

    def _listed(self) -> list[str]:
        content = self._send('/v1/models', None, seconds=_OTHER_SECONDS)
        try:
            return [str(model['id']) for model in content['data']]
        except (KeyError, TypeError) as error:
            raise self._strange('/v1/models', json.dumps(content)) from error

    def ask(self, request: Mapping[str, Any], *, max_tokens: int) -> Reply:
        """Return the greedy answer to a conversation.

        `request` has the key `messages`, and may have `tools` and other keys of the chat API. Raises Refused if the
        server answers with an HTTP error. Raises ConfigError if the server does not answer, or if its answer does not
        have the form of the OpenAI API.
        """
        body = {**self._named(), **request, 'max_tokens': max_tokens, 'temperature': 0}
        path = '/v1/chat/completions'
        if not self._gives_logprobs:
            return self._reply(path, self._send(path, body))
        try:
            return self._reply(path, self._send(path, {**body, 'logprobs': True, 'top_logprobs': TOP_LOGPROBS}))
        except Refused as error:
            if error.status in _BUSY or not 400 <= error.status < 500:
                raise
        reply = self._reply(path, self._send(path, body))
        self._gives_logprobs = False
        return reply

    def complete(self, prompt: str | Sequence[int], *, max_tokens: int) -> Reply:
        """Return the greedy continuation of a prompt, which is text or token ids. The server applies no template.

        Raises Refused if the server answers with an HTTP error. Raises ConfigError if the server does not answer, or
        if its answer does not have the form of the OpenAI API.
        """
        path = '/v1/completions'
        body = {**self._named(), 'prompt': prompt, 'max_tokens': max_tokens, 'temperature': 0}
        return self._reply(path, self._send(path, body))

    def prompt_ids(self, request: Mapping[str, Any]) -> list[int] | None:
        """Return the token ids into which the server converts a conversation, with the generation prompt.

        The OpenAI API has no request for this. vLLM and SGLang have one (/tokenize), and llama.cpp has a different one
        (/apply-template). Returns None if the server has neither, or if the request fails.
        """
        while self._id_forms:
            try:
                return self._id_forms[0](request)
            except Refused as error:
                if error.status in _BUSY:
                    return None  # this request only
                self._id_forms.pop(0)
            except (ConfigError, KeyError, TypeError, ValueError):
                self._id_forms.pop(0)
        return None

    def _ids_by_messages(self, request: Mapping[str, Any]) -> list[int]:
        body = {**self._named(), **request, 'add_generation_prompt': True}
        return _ids(self._send('/tokenize', body, seconds=_OTHER_SECONDS)['tokens'])

    def _ids_by_template(self, request: Mapping[str, Any]) -> list[int]:
        prompt = self._send('/apply-template', request, seconds=_OTHER_SECONDS)['prompt']
        body = {'content': prompt, 'add_special': True, 'parse_special': True}
        return _ids(self._send('/tokenize', body, seconds=_OTHER_SECONDS)['tokens'])

    def _named(self) -> dict[str, str]:
        return {} if self.model is None else {'model': self.model}

    def _send(self, path: str, body: Mapping[str, Any] | None, *, seconds: int = _ANSWER_SECONDS) -> Any:
        """Send a request to `path` and return the JSON answer. The request is GET if `body` is None, else POST.

        Raises Refused for an HTTP error. Raises ConfigError if the server cannot be reached, if it sends nothing for
        `seconds`, or if the answer is not JSON.
        """
        headers = {'Content-Type': 'application/json'}
        if self._key:
            headers['Authorization'] = f'Bearer {self._key}'
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=seconds) as response:
                text = response.read().decode('utf-8', 'replace')
        except urllib.error.HTTPError as error:
            raise Refused(error.code, self._shown(_message(error))) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._unanswered(path, error, seconds) from error
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._strange(path, text) from error

    def _unanswered(self, path: str, error: Exception, seconds: int) -> ConfigError:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return ConfigError(
                f'--check_server {self.address}: {path} gave no answer within {seconds} seconds. Wait until the server '
                'has loaded its model, or ask for shorter answers with --max_new_tokens.'
            )
        what = getattr(reason, 'strerror', None) or reason or type(error).__name__
        return ConfigError(
            f'--check_server {self.address}: no server answers there ({self._shown(str(what))}). Start it, e.g. with '
            '`transformers serve FOLDER`, or correct the address.'
        )

    def _strange(self, path: str, text: str) -> ConfigError:
        return ConfigError(
            f'--check_server {self.address}: {path} does not answer in the form of the OpenAI API: '
            f'{self._shown(text)!r}. Give the address of an OpenAI-style server, e.g. http://localhost:8000/v1.'
        )

    def _shown(self, text: str) -> str:
        """Return a text of the server for an error message: as one short line, without the API key."""
        shown = hide_secrets(text, {KEY_VARIABLE: self._key} if self._key else {})
        line = ''.join(c if c.isprintable() else ' ' for c in ' '.join(shown.split()))
        return line if len(line) <= _SHOWN_CHARACTERS else f'{line[:_SHOWN_CHARACTERS]}...'

    def _reply(self, path: str, content: Any) -> Reply:
        try:
            return _read_reply(content)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise self._strange(path, json.dumps(content)) from error


def _read_reply(content: Any) -> Reply:
    """Return `content`, the JSON answer of a server, as a Reply.

    Raises KeyError, IndexError, TypeError, AttributeError or ValueError if `content` does not have the form of the
    OpenAI API.
    """
    choice = content['choices'][0]
    usage = content.get('usage') or {}
    shared: dict[str, Any] = {
        'finish': choice.get('finish_reason'),
        'prompt_tokens': usage.get('prompt_tokens'),
        'new_tokens': usage.get('completion_tokens'),
    }
    if 'message' not in choice:
        return Reply(text=choice['text'], **shared)
    message = choice['message']
    return Reply(
        text=message.get('content') or '',
        reasoning=message.get('reasoning_content') or message.get('reasoning') or '',
        has_calls=bool(message.get('tool_calls')),
        first=_first_logprobs(choice.get('logprobs') or {}),
        **shared,
    )


def _first_logprobs(logprobs: Mapping[str, Any]) -> dict[str, float]:
    """Return {token: log probability} for the first token of the answer and for its listed alternatives.

    `logprobs` is the object of this name in the answer. Returns {} if it has no tokens.
    """
    first = next(iter(logprobs.get('content') or ()), None)
    if first is None:
        return {}
    listed = [first, *(first.get('top_logprobs') or ())]
    return {str(token['token']): float(token['logprob']) for token in listed}


def _ids(tokens: Any) -> list[int]:
    """Return the token ids in the answer of /tokenize.

    Raises ValueError if there are none, or if one of them is not an integer.
    """
    ids = [token['id'] if isinstance(token, dict) else token for token in tokens]
    if not ids or not all(isinstance(token, int) for token in ids):
        raise ValueError('no token ids')
    return ids


def _message(error: urllib.error.HTTPError) -> str:
    """Return the error message in the body of an HTTP error.

    Without a message, returns the whole body. If the body is empty or cannot be read, returns the HTTP reason, such as
    'Not Found'.
    """
    try:
        text = error.read().decode('utf-8', 'replace')
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text or str(error.reason)
    inner = content.get('error', content) if isinstance(content, dict) else content
    if isinstance(inner, dict):
        inner = inner.get('message') or inner.get('detail') or inner
    return inner if isinstance(inner, str) else json.dumps(inner)
