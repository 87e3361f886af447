"""The HTTP server: info, tree, resolve and a CDN behind signed addresses at another origin; what
is written stands in `uploads.py`.

Answers have the shape that huggingface_hub 2.4 requires; a test lets its `snapshot_download` loose
on them. Standard library only: faults need the socket itself.
"""

import hashlib
import hmac
import json
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub_server.content import Content, Repo, direct_entries, is_lfs, tree_entry
from tests.hub_server.faults import Fault, Faults, Request
from tests.hub_server.uploads import Uploads

_REPO = r"([\w.-]+/[\w.-]+)"
_BLOCK = 256 << 10
_LINK_SECONDS = 3600


class HubServer(ThreadingHTTPServer):
    """A Hub on 127.0.0.1; its CDN is the same server called `localhost`, another origin."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, token: str = "", port: int = 0, page: int = 1000) -> None:
        """Bind.

        Args:
            token: opens private and gated repositories.
            port: default: any free one.
            page: entries of a page of the tree.
        """
        super().__init__(("127.0.0.1", port), _Handler)
        self.token = token
        # Who owns the token, what it allows, and the owner's role in organizations.
        self.user, self.token_role = "tester", "write"
        self.organizations = {"org": "write", "team": "contributor"}
        self.page = page
        self.rate: float | None = None
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, Content] = {}
        self.names: dict[str, str] = {}
        self.faults = Faults()
        # Larger uploads come in parts of this size.
        self.part_bytes = 300_000
        self.parts: dict[str, bytes] = {}
        self.writing = threading.Lock()
        self.log: list[Request] = []
        self.connections: set[socket.socket] = set()
        self.closing = threading.Event()
        number = self.server_address[1]
        self.url, self.cdn_url = f"http://127.0.0.1:{number}", f"http://localhost:{number}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are part of the tests."""

    def add_folder(self, repo: str, folder: Path, **kind: bool) -> str:
        """Make a repository of a folder's files; returns its commit."""
        files = {path.name: Content.of(path) for path in sorted(folder.iterdir())}
        return self.add_commit(repo, files, **kind)

    def add_commit(self, repo: str, files: dict[str, Content], **kind: bool) -> str:
        """Make a commit on main, and the repository if there is none; returns the commit."""
        for name, content in files.items():
            self.blobs[content.sha256] = content
            self.names[content.sha256] = name
        return self.repos.setdefault(repo, Repo(**kind)).commit(files)

    def head(self, repo: str) -> dict[str, Content]:
        """Return the files of a repository's main branch."""
        found = self.repos[repo]
        return found.commits[found.branches["main"]]

    def hang_up(self) -> None:
        """Reset every open connection, as a router does while a machine sleeps."""
        for connection in list(self.connections):
            with suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                connection.shutdown(socket.SHUT_RDWR)

    def fault(self, *faults: Fault) -> None:
        """Do this wrong from now on."""
        for fault in faults:
            self.faults.add(fault)

    def requests(self, pattern: str) -> list[Request]:
        """Return the requests so far whose path or file matches."""
        return [r for r in list(self.log) if re.search(pattern, f"{r.path} {r.file}")]

    def sign(self, sha256: str, expires: int) -> str:
        """Return the signature of an address."""
        return hmac.new(b"cdn", f"{sha256}:{expires}".encode(), hashlib.sha256).hexdigest()


class _Handler(Uploads, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        with suppress(OSError):  # whoever was hung up on gets nothing more
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing: the server keeps its own log."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self._query = parse_qs(parts.query)
        self._asked = Request(
            self.command,
            unquote(parts.path),
            self.headers.get("Host", ""),
            self.headers.get("Range"),
            self.headers.get("Authorization"),
        )
        self.server.log.append(self._asked)
        self._fault = self.server.faults.take(self._asked.path)
        if self._fault and self._fault.kind == "delay":
            end = time.monotonic() + self._fault.seconds
            while time.monotonic() < end and not self._fault.until.is_set():
                if self.server.closing.wait(0.02):
                    break
        if self._fault and self._fault.kind == "reset_before":
            return self._reset()
        if not self._receive():
            return self._reset()
        if self._fault and self._fault.kind == "status":
            return self._json(self._fault.status, {"error": "on order"}, self._fault.headers)
        routes = {
            r"/api/whoami-v2": self._whoami,
            r"/api/models": self._models,
            rf"/api/(?:models|datasets)/{_REPO}(?:/revision/(.+))?": self._info,
            rf"/api/models/{_REPO}/refs": self._refs,
            rf"/api/models/{_REPO}/commits/(.+)": self._commits,
            rf"/api/(?:models|datasets)/{_REPO}/tree/([^/]+)(?:/(.+))?": self._tree,
            rf"/(?:datasets/)?{_REPO}/resolve/([^/]+)/(.+)": self._resolve,
            r"/cdn/([0-9a-f]{64})": self._cdn,
        }
        if self.command in ("POST", "PUT", "DELETE"):
            routes = self.upload_routes()
        for pattern, answer in routes.items():
            if match := re.fullmatch(pattern, self._asked.path):
                return answer(*match.groups())
        return self._json(404, {"error": "no such route"})

    # What the routes answer

    def _whoami(self) -> None:
        """Answer as the real one: a user, its organizations, and the token that was sent."""
        token = (self._asked.authorization or "").removeprefix("Bearer ")
        if not token or token != (self.server.token or token):
            said = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self._json(401, {"error": "Invalid credentials in Authorization header"}, said)
        organizations = [
            {"type": "org", "id": "1", "name": name, "fullname": name, "roleInOrg": role}
            for name, role in self.server.organizations.items()
        ]
        access = {"displayName": "of the tests", "role": self.server.token_role}
        return self._json(
            200,
            {
                "type": "user",
                "id": "0",
                "name": self.server.user,
                "fullname": self.server.user,
                "isPro": False,
                "orgs": organizations,
                "auth": {"type": "access_token", "accessToken": access},
            },
        )

    def _models(self) -> None:
        author = self._query.get("author", [""])[0]
        found = [name for name in self.server.repos if name.startswith(f"{author}/")]
        self._json(200, [{"_id": "0", "id": name, "modelId": name} for name in found])

    def _info(self, name: str, revision: str | None) -> None:
        found = self._find(name, revision or "main")
        if found is None:
            return
        commit, files = found
        full = "blobs" in self._query
        siblings = [
            {"rfilename": path, **(_blob(path, content) if full else {})}
            for path, content in sorted(files.items())
        ]
        repo = self.server.repos[name]
        self._json(
            200,
            {
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": commit,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "tags": [],
                "siblings": siblings,
            },
        )

    def _refs(self, name: str) -> None:
        if self._find(name, "main"):
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit}
                for branch, commit in self.server.repos[name].branches.items()
            ]
            self._json(200, {"branches": branches, "converts": [], "tags": []})

    def _commits(self, name: str, revision: str) -> None:
        """Answer with the last commit of a branch: nobody needs more."""
        found = self._find(name, revision)
        if found is not None:
            title, made = self.server.repos[name].told[found[0]]
            date = made.strftime("%Y-%m-%dT%H:%M:%S.000Z")
            said = {"title": title, "message": "", "date": date, "authors": []}
            self._json(200, [{"id": found[0], **said}])

    def _tree(self, name: str, revision: str, folder: str | None = None) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        inside = f"{folder}/" if folder else ""
        files = {p: c for p, c in sorted(found[1].items()) if p.startswith(inside)}
        entries = [tree_entry(path, content) for path, content in files.items()]
        if self._query.get("recursive") == ["false"]:
            entries = direct_entries(files, inside)
        begin = int(self._query.get("cursor", ["0"])[0])
        end = begin + self.server.page
        more = f"{self.server.url}{quote(self._asked.path)}?recursive=true&cursor={end}"
        headers = {"Link": f'<{more}>; rel="next"'} if end < len(entries) else {}
        self._json(200, entries[begin:end], headers)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._find(name, revision)
        if found is None:
            return None
        commit, files = found
        self._asked.file = path
        content = files.get(path)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            said = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._json(404, {"error": "Entry not found"}, headers | said)
        if not is_lfs(path):
            return self._body(content, headers | {"ETag": f'"{content.git_oid}"'})
        expired = self._fault is not None and self._fault.kind == "expired_link"
        expires = int(time.time()) + (-60 if expired else _LINK_SECONDS)
        signed = f"Expires={expires}&Signature={self.server.sign(content.sha256, expires)}"
        headers |= {
            "X-Linked-Etag": f'"{content.sha256}"',
            "X-Linked-Size": str(content.size),
            "Location": f"{self.server.cdn_url}/cdn/{content.sha256}?{signed}",
        }
        return self._json(302, {}, headers)

    def _cdn(self, sha256: str) -> None:
        self._asked.file = self.server.names.get(sha256, "")
        expires = int(self._query.get("Expires", ["0"])[0])
        signature = self._query.get("Signature", [""])[0]
        if signature != self.server.sign(sha256, expires) or expires < time.time():
            return self._json(403, {"error": "the address has expired"})
        return self._body(self.server.blobs[sha256], {"ETag": f'"{sha256}"'})

    def _find(self, name: str, revision: str) -> tuple[str, dict[str, Content]] | None:
        """Return commit and files of a revision, or answer with what is wrong."""
        repo = self.server.repos.get(name)
        allowed = self._asked.authorization == f"Bearer {self.server.token}"
        if repo is None or (repo.private and not allowed):
            said = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self._json(404 if allowed else 401, {"error": "Repository not found"}, said)
            return None
        if repo.gated and not allowed and "/resolve/" in self._asked.path:
            said = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
            self._json(401, {"error": "Access is restricted"}, said)
            return None
        commit = repo.resolve(revision)
        if commit is None:
            said = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
            self._json(404, {"error": "Invalid rev id"}, said)
            return None
        return commit, repo.commits[commit]

    # How they are sent

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        if self._fault and self._fault.kind == "lose_reply":
            return self._reset()
        data = json.dumps(value).encode()
        self._asked.status = status
        self._head(status, len(data), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)
        return None

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def _reset(self) -> None:
        self._asked.status = "reset"
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def _body(self, content: Content, headers: dict[str, str]) -> None:
        fault = self._fault or Fault("status", times=0)
        begin, end, status = 0, content.size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self._asked.range or "")
        if asked and fault.kind != "ignore_range":
            begin, status = int(asked[1]), 206
            end = min(end, int(asked[2]) + 1) if asked[2] else end
            if begin >= content.size:
                return self._json(416, {}, {"Content-Range": f"bytes */{content.size}"})
            begin += fault.after if fault.kind == "shift" else 0
            headers |= {"Content-Range": f"bytes {begin}-{end - 1}/{content.size}"}
        surplus = {"short": -fault.after, "long": fault.after}.get(fault.kind, 0)
        self._asked.status = status
        self._head(status, end - begin + surplus, {"Accept-Ranges": "bytes", **headers})
        if self.command == "HEAD":
            return None
        cut = begin + fault.after if fault.kind in ("drop", "reset", "stall") else end
        return self._send(content, begin, min(end + min(surplus, 0), cut), fault, surplus)

    def _send(self, content: Content, begin: int, end: int, fault: Fault, surplus: int) -> None:
        position = begin
        for block in content.read(begin, end):
            for start in range(0, len(block), _BLOCK):
                piece = block[start : start + _BLOCK]
                if fault.kind == "corrupt" and position <= fault.after < position + len(piece):
                    flipped = bytearray(piece)
                    flipped[fault.after - position] ^= 0x10
                    piece = bytes(flipped)
                self.wfile.write(piece)
                position += len(piece)
                if self.server.rate:
                    self.server.closing.wait(len(piece) / self.server.rate)
        if fault.kind == "long":
            self.wfile.write(b"\0" * surplus)
        if fault.kind == "stall":
            self.server.closing.wait(fault.seconds)
        if fault.kind == "reset":
            self._reset()
        if fault.kind in ("drop", "stall", "short"):
            self.close_connection = True


def _blob(path: str, content: Content) -> dict[str, Any]:
    """Return what `?blobs=true` says of a file."""
    said: dict[str, Any] = {"size": content.size, "blobId": content.git_oid}
    if is_lfs(path):
        said["lfs"] = {"sha256": content.sha256, "size": content.size, "pointerSize": 130}
    return said
