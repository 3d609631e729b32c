"""Both hubs on the loopback interface for the real clients: files in memory, recorded requests, faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, unquote_plus, urlsplit

COMMIT = 'c' * 40
LARGE = ('.safetensors', '.parquet', '.zip', '.png')

Files = dict[str, bytes]


@dataclass
class Fault:
    """The fault of the next `times` requests whose path contains `part`: a status, 'cut' or 'hang'."""

    part: str
    kind: int | str
    times: int = 1


@dataclass
class Answer:
    """A response: a status with JSON, or the bytes of a file."""

    status: int = 200
    content: Any = None
    data: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class LoopbackHub:
    """Repositories by kind and id, their files, the requests received, and the accepted token."""

    def __init__(self, *, user: str = 'someone') -> None:
        self.user = user
        self.reset(token='')
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
                hub.requests.append(f'{self.command} {unquote_plus(self.path)}')
                fault = hub.next_fault(self.command, unquote(self.path))
                if fault == 'hang':
                    time.sleep(hub.hang_seconds)
                if isinstance(fault, int):
                    answer = Answer(fault, {'Code': fault, 'Message': 'not now', 'Success': False})
                else:
                    answer = hub.answer(self.command, self.path, body, self.headers.get('Authorization') or '')
                self._send(answer, cut=fault == 'cut')

            def _send(self, answer: Answer, *, cut: bool) -> None:
                data = json.dumps(answer.content).encode() if answer.data is None else answer.data
                whole, start = len(data), 0
                wanted = re.match(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
                if answer.data is not None and wanted:
                    start = int(wanted[1])
                    data = data[start : int(wanted[2]) + 1 if wanted[2] else None]
                    answer.headers['Content-Range'] = f'bytes {start}-{start + len(data) - 1}/{whole}'
                    hub.resumed += start > 0
                self.send_response(206 if 'Content-Range' in answer.headers else answer.status)
                for name, value in {'Content-Type': 'application/json', **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header('Content-Length', str(len(data)))
                self.end_headers()
                if self.command == 'HEAD':
                    return
                if cut:
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.close()
                    return
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_HEAD = _answer  # noqa: N815

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self, *, token: str) -> None:
        """Remove everything and accept only this token."""
        self.token = token
        self.repos: dict[str, dict[str, Any]] = {}
        self.datasets: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.resumed = 0
        self.hang_seconds = 5.0

    def add(self, kind: str, repo_id: str, files: Files, *, commit: str = COMMIT) -> None:
        """Put a repository on both hubs. `commit` is the newest commit of its main branch."""
        repos = self.datasets if kind == 'dataset' else self.repos
        repos[repo_id] = {'files': dict(files), 'commit': commit, 'others': {}}

    def add_revision(self, repo_id: str, revision: str, files: Files, *, commit: str) -> None:
        """Add a branch or tag to a data set. Its files are also served for the commit itself."""
        for name in (revision, commit):
            self.datasets[repo_id]['others'][name] = {'files': dict(files), 'commit': commit}

    def next_fault(self, method: str, path: str) -> int | str | None:
        """Return the fault of this request and count it down."""
        for fault in self.faults:
            if fault.part in path and fault.times and (fault.kind != 'cut' or method == 'GET'):
                fault.times -= 1
                return fault.kind
        return None

    def fetched(self) -> list[str]:
        """Return the requests that asked for the bytes of a file."""
        return [r for r in self.requests if r.startswith('GET') and ('FilePath=' in r or '/resolve/' in r)]

    def answer(self, method: str, path: str, body: bytes, authorization: str) -> Answer:
        """Return the answer to a request."""
        parts = urlsplit(path)
        name, query = unquote(parts.path), parse_qs(parts.query)
        if name.startswith('/blob/') and method == 'PUT':
            self.blobs[name.removeprefix('/blob/')] = body
            return Answer(200, {'Code': 200, 'Success': True})
        if self.token not in authorization:
            return Answer(401, {'Code': 401, 'Message': 'no such token', 'error': 'no such token', 'Success': False})
        if name.startswith(('/api/v1/', '/openapi/')):
            return self._modelscope(method, name, query, body)
        return self._hugging_face(method, name, body)

    def _modelscope(self, method: str, name: str, query: dict[str, list[str]], body: bytes) -> Answer:
        if name == '/openapi/v1/users/me':
            return Answer(200, {'success': True, 'data': {'username': self.user, 'email': 'x@example.invalid'}})
        if name == '/api/v1/models' and method == 'POST':
            wanted = json.loads(body)
            repo_id = f'{wanted["Path"]}/{wanted["Name"]}'
            if repo_id in self.repos:
                return Answer(409, {'Code': 409, 'Message': 'it is there already', 'Success': False})
            self.repos[repo_id] = {'visibility': wanted.get('Visibility'), 'files': {}}
            return Answer(200, {'Code': 200, 'Success': True, 'Data': {'Name': wanted['Name'], 'Path': wanted['Path']}})
        if name.endswith('/info/lfs/objects/batch'):
            return Answer(200, {'Code': 200, 'Success': True, 'Data': self._batch(body)})
        if '/commit/' in name:
            return self._modelscope_commit(name.split('/models/')[1].split('/commit/')[0], json.loads(body))
        match = re.fullmatch(r'/api/v1/(models|datasets)/([^/]+/[^/]+)(/repo.*)?', name)
        revision = query.get('Revision', ['master'])[0]
        repo = self._repo(match[1], match[2], revision, main='master') if match else None
        if match is None or repo is None:
            return Answer(404, {'Code': 404, 'Message': f'not found: {method} {name}', 'Success': False})
        if match[3] == '/repo':
            data = repo['files'].get(query['FilePath'][0])
            return Answer(404, {'Code': 404}) if data is None else Answer(data=data)
        owner, short = match[2].split('/')
        listed = [
            {
                'Path': path, 'Name': path.rsplit('/', 1)[-1], 'Size': len(data), 'Type': 'blob', 'Sha256': _sha(data),
                # The hub names the last commit of each file.
                'Revision': repo.get('commit', COMMIT) if index == 0 else f'{index:040x}', 'CommittedDate': 100 - index,
            }
            for index, (path, data) in enumerate(repo['files'].items())
        ]  # fmt: skip
        return Answer(200, {'Code': 200, 'Success': True, 'Data': {'Name': short, 'Path': owner, 'Files': listed}})

    def _repo(self, kind: str, repo_id: str, revision: str, *, main: str) -> dict[str, Any] | None:
        repo = (self.datasets if kind == 'datasets' else self.repos).get(repo_id)
        if repo is None or revision in (main, repo.get('commit', COMMIT)):
            return repo
        found: dict[str, Any] | None = repo.get('others', {}).get(revision)
        return found

    def _batch(self, body: bytes) -> dict[str, Any]:
        objects = json.loads(body)['objects']
        links = [{**o, 'actions': {'upload': {'href': f'{self.url}/blob/{o["oid"]}'}}} for o in objects]
        return {'transfer': 'basic', 'objects': links}

    def _modelscope_commit(self, repo_id: str, commit: dict[str, Any]) -> Answer:
        for action in commit['actions']:
            is_large = action['type'] == 'lfs'
            content = self.blobs[action['sha256']] if is_large else base64.b64decode(action['content'])
            self.repos[repo_id]['files'][action['path']] = content
        self.commits.append(commit.get('commit_message', ''))
        return Answer(200, {'Code': 200, 'Success': True, 'Data': {'oid': '0' * 40}})

    def _hugging_face(self, method: str, name: str, body: bytes) -> Answer:
        if name == '/api/whoami-v2':
            return Answer(200, {'name': self.user, 'type': 'user', 'orgs': []})
        if name == '/api/validate-yaml':  # of a model card
            return Answer(200, {'warnings': [], 'errors': []})
        if name == '/api/repos/create':
            wanted = json.loads(body)
            repo_id = f'{wanted.get("organization") or self.user}/{wanted["name"]}'
            if repo_id in self.repos:
                return Answer(409, {'error': 'it is there already'})
            self.repos[repo_id] = {
                'visibility': 1 if wanted.get('private') or wanted.get('visibility') == 'private' else 5,
                'files': {},
            }
            return Answer(200, {'url': f'{self.url}/{repo_id}', 'name': repo_id})
        if name.endswith('/info/lfs/objects/batch'):
            return Answer(200, self._batch(body))
        if '/preupload/' in name:
            files = json.loads(body)['files']
            modes = [
                {
                    'path': f['path'],
                    'uploadMode': 'lfs' if f['path'].endswith(LARGE) else 'regular',
                    'shouldIgnore': False,
                }
                for f in files
            ]
            return Answer(200, {'files': modes})
        if '/commit/' in name:
            return self._hugging_face_commit(name.removeprefix('/api/models/').split('/commit/')[0], body)
        if match := re.fullmatch(r'/(datasets/)?(.+?)/resolve/(refs/convert/parquet|[^/]+)/(.+)', name):
            repo = self._repo('datasets' if match[1] else 'models', match[2], match[3], main='main')
            data = repo['files'].get(match[4]) if repo else None
            if data is None:
                return Answer(404, {'error': 'no such file'}, headers={'X-Error-Code': 'EntryNotFound'})
            assert repo is not None, 'it has the file'
            return Answer(data=data, headers={'ETag': f'"{_sha(data)}"', 'X-Repo-Commit': repo.get('commit', COMMIT)})
        match = re.fullmatch(r'/api/(models|datasets)/(.+?)(?:/(revision|tree)/(refs/convert/parquet|[^/]+))?', name)
        if match is None or self._repo(match[1], match[2], 'main', main='main') is None:
            return Answer(404, {'error': 'no such repository'}, headers={'X-Error-Code': 'RepoNotFound'})
        repo = self._repo(match[1], match[2], match[4] or 'main', main='main')
        if repo is None:
            return Answer(404, {'error': 'no such revision'}, headers={'X-Error-Code': 'RevisionNotFound'})
        listed = [{'type': 'file', 'path': p, 'size': len(d), 'oid': _sha(d)[:40]} for p, d in repo['files'].items()]
        if match[3] == 'tree':
            return Answer(200, listed)
        siblings = [{'rfilename': f['path'], 'size': f['size'], 'blobId': f['oid']} for f in listed]
        about = {'id': match[2], 'sha': repo.get('commit', COMMIT), 'private': False, 'tags': []}
        return Answer(200, {**about, 'siblings': siblings})

    def _hugging_face_commit(self, repo_id: str, body: bytes) -> Answer:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry['value']
            if entry['key'] == 'header':
                self.commits.append(value['summary'])
            elif entry['key'] == 'lfsFile':
                self.repos[repo_id]['files'][value['path']] = self.blobs[value['oid']]
            elif entry['key'] == 'file':
                self.repos[repo_id]['files'][value['path']] = base64.b64decode(value['content'])
        return Answer(
            200, {'commitUrl': f'{self.url}/{repo_id}/commit/{COMMIT}', 'commitOid': COMMIT, 'hookOutput': ''}
        )

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()
