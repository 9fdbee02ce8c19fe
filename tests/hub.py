"""
A stand-in for the model Hub on the loopback: as much of its API as `huggingface_hub` uses to push a model and to load
it again. What is pushed is kept in memory, a snapshot for each commit.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


USER, TOKEN = "someone", "hf_standin"


@dataclass
class Commit:
    """A commit: its message, and all files as they are after it."""

    message: str
    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        """Its name, 40 hex digits."""
        content = [self.message, *(name + hashlib.sha1(data).hexdigest() for name, data in sorted(self.files.items()))]
        return hashlib.sha1("\n".join(content).encode()).hexdigest()


@dataclass
class Hub:
    """What has been pushed: `repos["someone/model"]` is a list of commits, oldest first."""

    url: str = ""
    repos: dict[str, list[Commit]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def environment(self) -> dict[str, str]:
        """Variables with which a Python process takes this for the Hub."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


class _Refused(Exception):
    """The answer to a request that cannot be met: a status, and the Hub's name for what is wrong."""

    def __init__(self, status: int, code: str):
        super().__init__(code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Say nothing: the tests' output is for the tests."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        try:
            # (What is put into storage is known by its hash.)
            if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise _Refused(401, "Unauthorized")
            for method, pattern, action in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method.split():
                    with self.hub.lock:
                        answer, headers = action(self.hub, body, **found.groupdict())
                    break
            else:
                raise _Refused(404, "NotFound")
        except _Refused as refusal:
            self._send(refusal.status, b"{}", {"X-Error-Code": refusal.code})
            return
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self._send(200, content, headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _head(hub: Hub, repo: str, revision: str = "main") -> Commit:
    commits = hub.repos.get(repo)
    if commits is None:
        raise _Refused(404, "RepoNotFound")
    found = [commit for commit in commits if revision in ("main", commit.sha)]
    if not found:
        raise _Refused(404, "RevisionNotFound")
    return found[-1]


def _create(hub: Hub, body: bytes) -> Any:
    asked = json.loads(body)
    repo = f"{asked.get('organization') or USER}/{asked['name']}"
    hub.repos.setdefault(repo, [Commit("initial commit", {".gitattributes": b""})])
    return {"url": f"{hub.url}/{repo}", "name": repo, "id": "1"}, {}


def _preupload(hub: Hub, body: bytes, repo: str, revision: str) -> Any:
    _head(hub, repo, revision)
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin")) else "regular",
            "shouldIgnore": False,
        }
        for file in json.loads(body)["files"]
    ]
    return {"files": files}, {}


def _lfs_batch(hub: Hub, body: bytes, repo: str) -> Any:
    objects = [
        {**wanted, "authenticated": True, "actions": {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}}
        for wanted in json.loads(body)["objects"]
    ]
    return {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}


def _lfs_put(hub: Hub, body: bytes, oid: str) -> Any:
    if hashlib.sha256(body).hexdigest() != oid:
        raise _Refused(400, "BadRequest")
    hub.stored[oid] = body
    return b"", {}


def _commit(hub: Hub, body: bytes, repo: str, revision: str) -> Any:
    files = dict(_head(hub, repo, revision).files)
    message = ""
    for line in body.decode().splitlines():
        part = json.loads(line)
        value = part["value"]
        match part["key"]:
            case "header":
                message = value["summary"]
            case "file":
                files[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile":
                files[value["path"]] = hub.stored[value["oid"]]
            case "deletedFile":
                del files[value["path"]]
            case other:
                raise _Refused(400, f"no such operation: {other}")
    commit = Commit(message, files)
    hub.repos[repo].append(commit)
    return {"success": True, "commitOid": commit.sha, "commitUrl": f"{hub.url}/{repo}/commit/{commit.sha}"}, {}


def _info(hub: Hub, body: bytes, repo: str, revision: str | None = None) -> Any:
    commit = _head(hub, repo, revision or "main")
    siblings = [{"rfilename": name} for name in commit.files]
    return {"id": repo, "modelId": repo, "sha": commit.sha, "siblings": siblings, "private": False, "tags": []}, {}


def _tree(hub: Hub, body: bytes, repo: str, revision: str, folder: str | None = None) -> Any:
    files = _head(hub, repo, revision).files
    inside = f"{folder}/" if folder else ""
    found = [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in files.items()
        if name.startswith(inside)
    ]
    if folder and not found:
        raise _Refused(404, "EntryNotFound")
    return found, {}


def _resolve(hub: Hub, body: bytes, repo: str, revision: str, name: str) -> Any:
    commit = _head(hub, repo, revision)
    if name not in commit.files:
        raise _Refused(404, "EntryNotFound")
    data = commit.files[name]
    return data, {"X-Repo-Commit": commit.sha, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}


_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[\w.-]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _create),
    ("GET", "/api/whoami-v2", lambda hub, body: ({"name": USER, "type": "user", "orgs": []}, {})),
    ("POST", "/api/validate-yaml", lambda hub, body: ({"errors": [], "warnings": []}, {})),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", _preupload),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _lfs_put),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", _commit),
    ("GET", f"/api/models/{_REPO}(/revision/{_REVISION})?", _info),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(/(?P<folder>.+))?", _tree),
    ("GET HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<name>.+)", _resolve),
]


@contextlib.contextmanager
def hub_on_loopback() -> Iterator[Hub]:
    """A Hub without any repository, while it lasts."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
