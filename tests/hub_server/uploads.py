"""What can be written: repositories, branches, git-LFS objects, commits.

Modelled on what huggingface_hub 2.4 sends and requires. As on the real Hub, an LFS object exists
for its repository once its bytes were verified, a commit may name it without sending it again, and
a commit on anything but the given parent is refused with 412.
"""

import base64
import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, quote

from tests.hub_server.content import Content, Repo, is_lfs, tree_entry

_REPO = r"([\w.-]+/[\w.-]+)"


class Uploads:
    """The handler's routes for POST, PUT and DELETE."""

    server: Any
    _asked: Any
    _fault: Any

    def upload_routes(self) -> dict[str, Any]:
        if self.command == "PUT":
            return {r"/lfs/put/(.+)/([0-9a-f]{64})/(\d+)": self._put}
        if self.command == "DELETE":
            return {rf"/api/models/{_REPO}/branch/(.+)": self._delete_branch}
        return {
            r"/api/repos/create": self._create_repo,
            r"/api/validate-yaml": lambda: self._json(200, {"errors": [], "warnings": []}),
            rf"/api/models/{_REPO}/branch/(.+)": self._create_branch,
            rf"/api/(?:models|datasets)/{_REPO}/paths-info/(.+)": self._paths_info,
            rf"/api/models/{_REPO}/preupload/(.+)": self._preupload,
            rf"/api/models/{_REPO}/commit/(.+)": self._commit,
            rf"/{_REPO}\.git/info/lfs/objects/batch": self._batch,
            r"/lfs/complete/(.+)/([0-9a-f]{64})": self._complete,
            r"/lfs/verify/(.+)/([0-9a-f]{64})": self._verify,
        }

    def _receive(self) -> bool:
        """Read what is sent; False when the connection is to be cut, or was."""
        length = int(self.headers.get("Content-Length", 0))
        end = length
        if self._fault and self._fault.kind == "cut_upload":
            end = min(length, self._fault.after)
        blocks: list[bytes] = []
        try:
            while self._asked.received < end:
                block = self.rfile.read1(min(1 << 16, end - self._asked.received))
                if not block:
                    return False
                self._asked.received += len(block)
                blocks.append(block)
                if self.server.rate:
                    self.server.closing.wait(len(block) / self.server.rate)
        except OSError:
            return False
        self._sent = b"".join(blocks)
        return not (self._fault and self._fault.kind == "cut_upload")

    def _writable(self, name: str) -> Repo | None:
        """Return a repository that the sender may write to, or answer with what is wrong."""
        repo = self.server.repos.get(name)
        allowed = self._asked.authorization == f"Bearer {self.server.token}"
        if self.server.token and not (allowed and self.server.token_role == "write"):
            said = {"X-Error-Message": "You have no right to write here"}
            self._json(403, {"error": "You have no right to write here"}, said)
            return None
        if repo is None:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repo

    def _create_repo(self) -> None:
        wanted = json.loads(self._sent)
        name = f"{wanted['organization']}/{wanted['name']}"
        owner = wanted["organization"]
        roles = {self.server.user: "admin", **self.server.organizations}
        if self.server.token and roles.get(owner, "read") == "read":
            reason = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            self._json(403, {"error": reason}, {"X-Error-Message": reason})
            return
        if name in self.server.repos:
            if self._writable(name):
                url = f"{self.server.url}/{name}"
                self._json(409, {"error": "You already created this model repo", "url": url})
            return
        self.server.repos[name] = Repo()
        if self._writable(name) is None:
            del self.server.repos[name]
            return
        repo = self.server.repos[name]
        repo.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repo.commit({".gitattributes": Content.of_bytes(b"*.safetensors filter=lfs\n")})
        self._json(200, {"url": f"{self.server.url}/{name}", "name": name})

    def _create_branch(self, name: str, branch: str) -> None:
        if (repo := self._writable(name)) is None:
            return None
        start = repo.resolve(json.loads(self._sent or b"{}").get("startingPoint", "main"))
        if branch in repo.branches:
            return self._json(409, {"error": "Reference already exists"})
        if start is None:
            return self._json(404, {"error": "no such start"}, {"X-Error-Code": "RevisionNotFound"})
        repo.branches[branch] = start
        return self._json(200, {})

    def _delete_branch(self, name: str, branch: str) -> None:
        if (repo := self._writable(name)) is None:
            return None
        if repo.branches.pop(branch, None) is None:
            return self._json(404, {"error": "no branch"}, {"X-Error-Code": "RevisionNotFound"})
        return self._json(200, {})

    def _paths_info(self, name: str, revision: str) -> None:
        found = self._find(name, revision)
        if found is not None:
            wanted = parse_qs(self._sent.decode()).get("paths", [])
            files = {path: found[1][path] for path in wanted if path in found[1]}
            self._json(200, [tree_entry(path, content) for path, content in files.items()])

    def _preupload(self, name: str, revision: str) -> None:
        if self._writable(name) is None or (found := self._find(name, revision)) is None:
            return
        answers: list[dict[str, Any]] = []
        for file in json.loads(self._sent)["files"]:
            there = found[1].get(file["path"])
            lfs = is_lfs(file["path"])
            answer = {
                "path": file["path"],
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": False,
            }
            if there:
                answer["oid"] = there.sha256 if lfs else there.git_oid
            answers.append(answer)
        self._json(200, {"files": answers})

    def _batch(self, name: str) -> None:
        if (repo := self._writable(name)) is None:
            return
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(self._sent)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry = {"oid": oid, "size": size}
            if oid not in repo.lfs:
                place = f"{self.server.cdn_url}/lfs/put/{quote(name)}/{oid}"
                parts = -(-size // self.server.part_bytes)
                upload: dict[str, Any] = {"href": f"{place}/1"}
                if parts > 1:
                    upload["href"] = f"{self.server.url}/lfs/complete/{quote(name)}/{oid}"
                    upload["header"] = {"chunk_size": str(self.server.part_bytes)} | {
                        f"{i:05d}": f"{place}/{i}" for i in range(1, parts + 1)
                    }
                verify = {"href": f"{self.server.url}/lfs/verify/{quote(name)}/{oid}"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self._json(200, {"transfer": "multipart", "objects": objects})

    def _put(self, name: str, oid: str, part: str) -> None:
        self.server.parts[f"{name}/{oid}/{part}"] = self._sent
        etag = hashlib.md5(self._sent).hexdigest()  # noqa: S324 - S3's own
        self._json(200, {}, {"ETag": f'"{etag}"'})

    def _complete(self, name: str, oid: str) -> None:
        keys = [f"{name}/{oid}/{part['partNumber']}" for part in json.loads(self._sent)["parts"]]
        whole = b"".join(self.server.parts[key] for key in keys)
        for key in keys:
            del self.server.parts[key]
        self.server.parts[f"{name}/{oid}/1"] = whole
        self._json(200, {})

    def _verify(self, name: str, oid: str) -> None:
        if oid in self.server.repos[name].lfs:
            return self._json(200, {})
        data = self.server.parts.pop(f"{name}/{oid}/1", b"")
        if hashlib.sha256(data).hexdigest() != oid:
            return self._json(422, {"error": "the bytes are not those of the oid"})
        self.server.blobs[oid] = Content.of_bytes(data)
        self.server.repos[name].lfs.add(oid)
        return self._json(200, {})

    def _commit(self, name: str, revision: str) -> None:
        if (repo := self._writable(name)) is None:
            return None
        lines = [json.loads(line) for line in self._sent.splitlines()]
        with self.server.writing:
            head = repo.branches.get(revision)
            if head is None:
                return self._json(404, {"error": "no branch"}, {"X-Error-Code": "RevisionNotFound"})
            header = next(x["value"] for x in lines if x["key"] == "header")
            parent = header.get("parentCommit")
            if parent not in (None, head):
                return self._json(412, {"error": "A commit has happened since. Please refresh."})
            files = dict(repo.commits[head])
            wrong = next(filter(None, (self._apply(repo, files, line) for line in lines)), None)
            if wrong:
                return self._json(400, {"error": wrong}, {"X-Error-Message": wrong})
            for path, content in files.items():
                self.server.blobs.setdefault(content.sha256, content)
                self.server.names.setdefault(content.sha256, path)
            commit = repo.commit(files, revision, header["summary"])
        url = f"{self.server.url}/{name}/commit/{commit}"
        return self._json(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def _apply(self, repo: Repo, files: dict[str, Content], line: dict[str, Any]) -> str | None:
        """Do one line of a commit; returns what is wrong."""
        kind, value = line["key"], line["value"]
        if kind == "file":
            files[value["path"]] = Content.of_bytes(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            if value["oid"] not in repo.lfs:
                return f"LFS pointer of {value['path']} points to a file that does not exist"
            files[value["path"]] = self.server.blobs[value["oid"]]
        elif kind == "deletedFile":
            if files.pop(value["path"], None) is None:
                return "A file with this name doesn't exist"
        elif kind != "header":
            return f"unknown operation {kind}"
        return None
