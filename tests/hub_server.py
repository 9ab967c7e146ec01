"""A model hub on loopback for tests: the requests that huggingface_hub makes, and no others.

Repositories live in memory: commits are dicts of file contents, branches name commits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import running

#: Files from this size on go over LFS, where the hub has it on.
LFS_FROM = 4096


@dataclass
class Repository:
    """Of a name: who may read it, and what it holds."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(
        self, files: dict[str, bytes], branch: str = "main", gone: Collection[str] = ()
    ) -> str:
        """Adds files to a branch, takes out those that are ``gone``, and gives the commit."""
        content = dict(self.commits.get(self.branches.get(branch, ""), {})) | files
        content = {name: each for name, each in content.items() if name not in gone}
        parts = [f"{len(self.commits)}", *(f"{k} {_sha256(v)}" for k, v in sorted(content.items()))]
        sha = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = content, sha
        return sha

    def at(self, revision: str) -> str | None:
        """The commit of a branch or of its own name."""
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


def folder_files(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by their names in a repository."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(file: str, content: bytes) -> dict[str, object]:
    """What the hub says of a file."""
    entry = {"type": "file", "path": file, "size": len(content), "oid": _blob(content)}
    if len(content) >= LFS_FROM:
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
    return entry


def _directory(path: str) -> dict[str, object]:
    return {"type": "directory", "path": path, "oid": _blob(path.encode())}


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: by hub id.
        readers: tokens that see private and gated repositories.
        writers: tokens that may write.
        asked: (method, path, token) of each request.
        broken: names of files of which half is sent.
        lfs: whether large files are uploaded by themselves.
        status: answered to every request, where it is given.
        silent: nothing is answered while it is clear.
        meanwhile: called before a commit, as another person would make one.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.repositories: dict[str, Repository] = {}
        self.readers, self.writers = {"hf_reader"}, {"hf_writer"}
        self.asked: list[tuple[str, str, str | None]] = []
        self.broken: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.lfs, self.status = False, 0
        self.silent = threading.Event()
        self.silent.set()
        self.meanwhile: Callable[[], object] = lambda: None
        self.connections: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def process_request(self, request: socket.socket, address: tuple[str, int]) -> None:
        self.connections.append(request)
        super().process_request(request, address)

    def server_close(self) -> None:
        """Ends the connections that clients keep open, too."""
        self.silent.set()
        super().server_close()
        for each in self.connections:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def repository(self, name: str, folder: Path | None = None, **facts: bool) -> Repository:
        """A new repository with the files of a folder."""
        made = self.repositories[name] = Repository(**facts)
        made.commit({".gitattributes": b""} | ({} if folder is None else folder_files(folder)))
        return made

    def downloads(self) -> list[str]:
        """The files that were asked for, not their headers."""
        found = [p for method, p, _ in self.asked if method == "GET" and "/resolve/" in p]
        return [re.sub(r".*/resolve/[^/]+/", "", unquote(urlsplit(path).path)) for path in found]


class _Refused(Exception):
    def __init__(
        self, status: int, code: str | None = None, message: str = "", **more: str
    ) -> None:
        self.status, self.code, self.message, self.more = status, code, message, more


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Nothing: what was asked for is in the server's list."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        header = self.headers.get("Authorization")
        self.token = None if header is None else header.removeprefix("Bearer ")
        self.server.asked.append((self.command, self.path, self.token))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, self.query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        self.server.silent.wait()
        try:
            if self.server.status:
                raise _Refused(self.server.status)
            for method, pattern, act in _ROUTES:
                if method == self.command.replace("HEAD", "GET") and (
                    found := re.fullmatch(pattern, path)
                ):
                    act(self, *found.groups())
                    return
            raise _Refused(501, message=f"{self.command} {self.path}")
        except _Refused as error:
            headers = {"X-Error-Message": error.message or str(error.code)}
            if error.code:
                headers["X-Error-Code"] = error.code
            said = {"error": error.message, **error.more}
            self._send(json.dumps(said).encode(), error.status, headers)

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _readable(self, name: str, content: bool = False) -> Repository:
        """The repository, for whoever may see it, or its content."""
        repository = self.server.repositories.get(name)
        known = self.token in self.server.readers | self.server.writers
        if repository is None or (repository.private and not known):
            raise _Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        if content and repository.gated and not known:
            raise _Refused(403 if self.token else 401, "GatedRepo", f"Access to {name} is gated")
        return repository

    def _writable(self, name: str) -> Repository:
        if self.token not in self.server.writers:
            raise _Refused(403 if self.token else 401, message="You may not write")
        return self._readable(name)

    def _commit(self, repository: Repository, revision: str) -> str:
        sha = repository.at(revision)
        if sha is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # -- reading ----------------------------------------------------------------------------------

    def info(self, name: str, revision: str | None) -> None:
        repository = self._readable(name)
        sha = self._commit(repository, revision or "main")
        self._json(
            {
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "tags": [],
                "downloads": 0,
                "siblings": [{"rfilename": file} for file in sorted(repository.commits[sha])],
            }
        )

    def tree(self, name: str, revision: str, folder: str | None) -> None:
        repository = self._readable(name)
        files = repository.commits[self._commit(repository, revision)]
        if folder is not None:
            files = {k: v for k, v in files.items() if k.startswith(f"{folder}/")}
            if not files:
                raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        entries = {file: _entry(file, content) for file, content in sorted(files.items())}
        if self.query.get("recursive", ["False"])[0].lower() not in ("true", "1"):
            start = 0 if folder is None else len(folder) + 1
            for file in [file for file in entries if "/" in file[start:]]:
                del entries[file]
                inside = file[: file.index("/", start)]
                entries[inside] = _directory(inside)
        self._json(list(entries.values()))

    def paths(self, name: str, revision: str) -> None:
        repository = self._readable(name)
        files = repository.commits[self._commit(repository, revision)]
        entries = []
        for path in parse_qs(self.body.decode())["paths"]:
            if path in files:
                entries.append(_entry(path, files[path]))
            elif any(file.startswith(f"{path}/") for file in files):
                entries.append(_directory(path))
        self._json(entries)

    def resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._readable(name, content=True)
        sha = self._commit(repository, revision)
        if file not in repository.commits[sha]:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        content = repository.commits[sha][file]
        tag = _sha256(content) if len(content) >= LFS_FROM else _blob(content)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status = 200
        if found:
            status, start = 206, int(found[1])
            end = min(int(found[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        if file in self.server.broken and self.command == "GET":
            headers["Content-Length"] = str(len(content))
            self._send(content[: len(content) // 2], status, headers)
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self._send(content, status, headers)

    # -- writing ----------------------------------------------------------------------------------

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if self.token not in self.server.writers:
            raise _Refused(403 if self.token else 401, message="You may not write")
        if name in self.server.repositories:
            url = f"{self.server.url}/{name}"
            raise _Refused(409, message="You already created this model repo", url=url)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server.repository(name, private=private)
        self._json({"url": f"{self.server.url}/{name}", "name": name, "id": "1"})

    def branch(self, name: str, branch: str) -> None:
        repository = self._writable(name)
        if branch in repository.branches:
            raise _Refused(409, message="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self._json({})

    def yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        self._commit(self._writable(name), revision)
        files = []
        for file in json.loads(self.body)["files"]:
            large = self.server.lfs and file["size"] >= LFS_FROM
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self._json({"files": files})

    def batch(self, name: str) -> None:
        self._writable(name)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.url}/lfs/{wanted['oid']}"}
            there = wanted["oid"] in self.server.objects
            objects.append({**wanted, **({} if there else {"actions": {"upload": upload}})})
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if _sha256(self.body) != oid:
            raise _Refused(400, message="another object")
        self.server.objects[oid] = self.body
        self._send(b"")

    def commit(self, name: str, revision: str) -> None:
        repository = self._writable(name)
        self.server.meanwhile()
        start = self._commit(repository, revision)
        files, gone, message = {}, set(), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", start) != start:
                    raise _Refused(412, message="A commit has happened since. Please refresh")
            elif entry["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                gone.add(value["path"])
            else:
                raise _Refused(501, message=entry["key"])
        request = None
        if self.query.get("create_pr") == ["1"]:
            revision = f"refs/pr/{1 + sum(b.startswith('refs/pr/') for b in repository.branches)}"
            repository.branches[revision] = start
            request = f"{self.server.url}/{name}/discussions/{revision.rpartition('/')[2]}"
        sha = repository.commit(files, revision, gone)
        repository.messages.append(message)
        url = f"{self.server.url}/{name}/commit/{sha}"
        made = {"commitUrl": url, "commitOid": sha, "pullRequestUrl": request, "success": True}
        self._json(made)


_NAME = r"([^/]+/[^/]+)"
_KIND = "(?:models|datasets)"
_ROUTES = (
    ("GET", rf"/api/{_KIND}/{_NAME}(?:/revision/(.+))?", _Requests.info),
    ("GET", rf"/api/{_KIND}/{_NAME}/tree/(refs/pr/\d+|[^/]+)(?:/(.+))?", _Requests.tree),
    ("POST", rf"/api/datasets/{_NAME}/paths-info/([^/]+)", _Requests.paths),
    ("GET", rf"/(?:datasets/)?{_NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", _Requests.resolve),
    ("POST", r"/api/repos/create", _Requests.create),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Requests.branch),
    ("POST", r"/api/validate-yaml", _Requests.yaml),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Requests.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Requests.batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Requests.store),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Requests.commit),
)


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub without repositories; its ``url`` goes into HF_ENDPOINT."""
    with running(Hub()) as hub:
        yield hub
