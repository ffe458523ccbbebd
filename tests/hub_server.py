"""A real local HTTP server that speaks the part of the Hugging Face hub's file API that clients read from.

``huggingface_hub`` reads ``HF_ENDPOINT`` when imported, so point a fresh process at ``HubServer.endpoint``.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TAG = "v1"

_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_API = re.compile(rf"/api/models/{_REPO}(?:/(?P<kind>revision|tree)/(?P<rev>[^/]+)(?:/(?P<path>.+))?)?")
_RESOLVE = re.compile(rf"/{_REPO}/(?P<kind>resolve)/(?P<rev>[^/]+)/(?P<path>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class HubServer:
    """A running hub.

    Attributes:
        endpoint: Its URL, for ``HF_ENDPOINT``.
        repos: The folder served as each ``org/name``; its files are read anew on each request.
        requests: Every ``(method, path)`` seen so far, in order; the path is as sent, query included.
        commit: The sha that ``main`` and the tag ``v1`` resolve to, in every repo; set it anew to "push".
    """

    endpoint: str
    repos: Mapping[str, Path]
    requests: list[tuple[str, str]] = field(default_factory=list)
    commit: str = COMMIT


@contextmanager
def serve_hub(repos: Mapping[str, Path]) -> Iterator[HubServer]:
    """Serve local folders as hub model repos on a free port of 127.0.0.1.

    Args:
        repos: The folder to serve as each ``org/name``.

    Yields:
        The running hub; on exit it finishes the requests in flight and stops listening.
    """
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.hub = HubServer(f"http://127.0.0.1:{server.server_port}", repos)
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.hub
        finally:
            server.shutdown()
            thread.join()


def _git_oid(data: bytes) -> str:
    """Return the git blob id of a file's content, which the hub uses as its ETag."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Server(ThreadingHTTPServer):
    """An HTTP server that holds its hub, and waits for its open requests when closed."""

    hub: HubServer
    daemon_threads = False
    request_queue_size = 64  # snapshot_download connects from many threads at once


class _Handler(BaseHTTPRequestHandler):
    """Answers one request (HTTP/1.0: one a connection, so none outlives the server)."""

    server: _Server
    timeout = 10

    def parse_request(self) -> bool:
        """Note each request, whatever its method."""
        parsed = super().parse_request()
        if parsed:
            self.server.hub.requests.append((self.command, self.path))
        return parsed

    def do_GET(self) -> None:
        """Answer an API call or a file."""
        url = urlsplit(self.path)
        match = _API.fullmatch(url.path) or _RESOLVE.fullmatch(url.path)
        if match is None:
            return self._send_error(404, "Not Found")
        hub, query = self.server.hub, parse_qs(url.query)
        repo, kind, rev, path = (unquote(part or "") for part in match.groups())
        if repo not in hub.repos:
            status = 404 if "Authorization" in self.headers else 401
            return self._send_error(status, "Repository not found", "RepoNotFound")
        if rev not in ("", "main", TAG, hub.commit):
            return self._send_error(404, f"Invalid rev id: {match['rev']}", "RevisionNotFound")

        root = hub.repos[repo]
        entries = {entry.relative_to(root).as_posix(): entry for entry in sorted(root.rglob("*"))}
        if kind == "resolve" and path in entries and entries[path].is_file():
            self._send_file(entries[path].read_bytes())
        elif kind == "tree" and (not path or path in entries and entries[path].is_dir()):
            recursive = query.get("recursive", [""])[0].lower() == "true"
            self._send_tree(entries, f"{path}/" if path else "", recursive)
        elif kind in ("resolve", "tree"):
            self._send_error(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": hub.commit})
        else:
            self._send_info(repo, entries, "blobs" in query)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output quiet."""

    def _send_info(self, repo: str, entries: Mapping[str, Path], blobs: bool) -> None:
        """Send what ``model_info`` reads, each file's size and id with it when asked for."""
        siblings: list[dict[str, object]] = []
        for name in (name for name, entry in entries.items() if entry.is_file()):
            siblings.append({"rfilename": name})
            if blobs:
                data = entries[name].read_bytes()
                siblings[-1] |= {"size": len(data), "blobId": _git_oid(data)}
        info = {"id": repo, "modelId": repo, "author": repo.rpartition("/")[0], "sha": self.server.hub.commit}
        flags = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        dates = dict.fromkeys(("createdAt", "lastModified"), "2024-01-01T00:00:00.000Z")
        self._send_json(200, {**info, **flags, **dates, "siblings": siblings})

    def _send_tree(self, entries: Mapping[str, Path], prefix: str, recursive: bool) -> None:
        """Send the files and folders under a prefix, those of its subfolders too if recursive."""
        tree = []
        for name, entry in entries.items():
            if name.startswith(prefix) and (recursive or "/" not in name[len(prefix) :]):
                data = entry.read_bytes() if entry.is_file() else name.encode()  # a folder's id is made up
                kind, size = ("file", len(data)) if entry.is_file() else ("directory", 0)
                tree.append({"type": kind, "oid": _git_oid(data), "size": size, "path": name})
        self._send_json(200, tree)

    def _send_file(self, data: bytes) -> None:
        """Send a file, or the range of it that was asked for."""
        size, span = len(data), _RANGE.fullmatch(self.headers.get("Range", ""))
        headers = {"ETag": f'"{_git_oid(data)}"', "X-Repo-Commit": self.server.hub.commit}
        if span is None:
            return self._send(200, data, headers | {"Accept-Ranges": "bytes"})
        start, stop = int(span[1]), min(int(span[2] or size) + 1, size)
        if start >= stop:
            return self._send_error(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{size}"})
        self._send(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    def _send_error(self, status: int, message: str, code: str = "", **headers: str) -> None:
        """Send an error, with the code that a client maps to its exception."""
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send_json(status, {"error": message}, **headers)

    def _send_json(self, status: int, content: object, **headers: str) -> None:
        """Send JSON."""
        self._send(status, json.dumps(content).encode(), headers | {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a response; to a HEAD, without its body."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
