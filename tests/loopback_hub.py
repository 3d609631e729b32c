"""A hub on the loopback interface that the real ModelScope client can push to: keeps files in memory."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LoopbackHub:
    """Repositories by id, the files in them, the requests seen, and tokens that are let in."""

    def __init__(self, *, user: str = 'someone') -> None:
        self.user = user
        self.reset(token='')
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
                status, content = hub.answer(self.command, self.path, body, self.headers.get('Authorization') or '')
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header('Content-Type', 'application/json')
                self.send_header('Content-Length', str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_HEAD = _answer  # noqa: N815

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self, *, token: str) -> None:
        """Forget everything and let only this token in."""
        self.token = token
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[str] = []

    def answer(self, method: str, path: str, body: bytes, authorization: str) -> tuple[int, dict[str, Any]]:
        """Return (status, JSON) for a request."""
        path = path.split('?')[0]
        if path.startswith('/blob/') and method == 'PUT':
            self.blobs[path.removeprefix('/blob/')] = body
            return 200, {'Code': 200, 'Success': True}
        if self.token not in authorization:
            return 401, {'Code': 401, 'Message': 'no such token', 'Success': False}
        if path == '/openapi/v1/users/me':
            return 200, {'success': True, 'data': {'username': self.user, 'email': 'x@example.invalid'}}
        if path == '/api/v1/models' and method == 'POST':
            wanted = json.loads(body)
            name = f'{wanted["Path"]}/{wanted["Name"]}'
            if name in self.repos:
                return 409, {'Code': 409, 'Message': 'it is there already', 'Success': False}
            self.repos[name] = {'visibility': wanted.get('Visibility'), 'files': {}}
            return 200, {'Code': 200, 'Success': True, 'Data': {'Name': wanted['Name'], 'Path': wanted['Path']}}
        if path.endswith('/info/lfs/objects/batch'):
            objects = [
                {**o, 'actions': {'upload': {'href': f'{self.url}/blob/{o["oid"]}'}}}
                for o in json.loads(body)['objects']
            ]
            return 200, {'Code': 200, 'Success': True, 'Data': {'objects': objects}}
        if '/commit/' in path:
            return self._commit(path.split('/models/')[1].split('/commit/')[0], json.loads(body))
        parts = path.split('/')
        if path.startswith('/api/v1/models/') and method == 'GET':
            name = '/'.join(parts[4:6])
            if name not in self.repos:
                return 404, {'Code': 404, 'Message': 'not found', 'Success': False}
            return 200, {'Code': 200, 'Success': True, 'Data': {'Name': parts[5], 'Path': parts[4], 'Files': []}}
        return 404, {'Code': 404, 'Message': f'unknown {method} {path}', 'Success': False}

    def _commit(self, repo: str, commit: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        for action in commit['actions']:
            is_large = action['type'] == 'lfs'
            content = self.blobs[action['sha256']] if is_large else base64.b64decode(action['content'])
            self.repos[repo]['files'][action['path']] = content
        self.commits.append(commit.get('commit_message', ''))
        return 200, {'Code': 200, 'Success': True, 'Data': {'oid': '0' * 40}}

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()
