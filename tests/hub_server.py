"""A Hugging Face Hub on 127.0.0.1, as small as `push_to_hub` and `from_pretrained` allow. Standard library only.

    with HubServer(folder) as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(home)}, check=True)

Models only, uploads in one commit: regular files inside the commit, large ones through Git LFS. The client has to run
in a process of its own, because huggingface_hub reads its endpoint from the environment once, when it is imported.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
LFS_SIZE = 10 * 1024 * 1024  # larger files go through LFS whatever their name, as on the real Hub
COPY_SIZE = 1024 * 1024


class HubError(Exception):
    """An answer other than success. The client picks its exception class by the code, so it has to be the Hub's."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit; its content lies under its sha256, shared by all commits and repositories."""

    sha256: str
    size: int
    git_oid: str
    is_lfs: bool

    @property
    def compared_oid(self) -> str:
        """What the client compares with its local file, to leave unchanged files out of a commit."""
        return self.sha256 if self.is_lfs else self.git_oid


Files = dict[str, StoredFile]  # path in the repository -> file


class Repository:
    """Commits are whole listings: nothing asks for history, only for the files at a revision."""

    def __init__(self, files: Files):
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.add_commit("main", files)

    def add_commit(self, branch: str, files: Files) -> str:
        commit = secrets.token_hex(20)  # the length of a git id, by which the client tells a commit from a branch
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def find_commit(self, revision: str) -> str:
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


class HubServer:
    """Serves while the `with` block runs. Contents are kept in the folder `root`, repositories in memory."""

    def __init__(self, root: str | os.PathLike, token: str = "hf_test", user: str = "tester"):
        self.root = Path(root)
        self.token = token
        self.user = user
        self.repositories: dict[str, Repository] = {}
        self.write_lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        self.root.mkdir(parents=True, exist_ok=True)
        self._server = _Server(("127.0.0.1", 0), HubRequestHandler)
        self._server.hub = self
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: str | os.PathLike) -> dict[str, str]:
        """The variables that send a client here and nowhere else, whatever the user's own settings are."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home, "hub")),
            "HF_HUB_DISABLE_XET": "1",  # the content store of Xet is no part of this server
            "HF_HUB_OFFLINE": "0",
            "no_proxy": "127.0.0.1",
        }

    def content_path(self, sha256: str) -> Path:
        return self.root / sha256

    def store_content(self, content: bytes) -> StoredFile:
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.content_path(sha256).exists():  # never truncate what a download may be reading
            self.content_path(sha256).write_bytes(content)
        return StoredFile(sha256, len(content), _git_oid(content), is_lfs=False)

    def stored_lfs_file(self, sha256: str) -> StoredFile:
        """The file as git sees it, which holds a pointer to the content uploaded before."""
        if not self.content_path(sha256).exists():
            raise HubError(400, "BadRequest", f"LFS object {sha256} was not uploaded")
        size = self.content_path(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return StoredFile(sha256, size, _git_oid(pointer.encode()), is_lfs=True)

    def new_repository(self) -> Repository:
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        return Repository({".gitattributes": self.store_content(attributes.encode())})


class _Server(ThreadingHTTPServer):
    hub: HubServer


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(path: str, file: StoredFile) -> dict:
    entry = {"type": "file", "path": path, "size": file.size, "oid": file.git_oid}
    if file.is_lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return entry


class HubRequestHandler(BaseHTTPRequestHandler):
    """One request. It speaks HTTP/1.0, one connection each: a server that is gone then answers nobody."""

    server: _Server

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub

    def log_message(self, *arguments: object) -> None:
        """Keep the output of the tests clean."""

    def handle_request(self) -> None:
        self.body = self._body_parts()
        try:
            action, values = self._find_route()
            self._check_token()
            action(self, **values)
        except HubError as error:
            self._send_json({"error": str(error)}, error.status, error.headers)
        for _ in self.body:  # closing a connection with unread bytes may cost the client the answer
            pass

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _find_route(self) -> tuple[Callable, dict[str, str]]:
        method = "GET" if self.command == "HEAD" else self.command
        path = urlsplit(self.path).path
        for route_method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and route_method == method:
                # unquoted only now: a quoted branch name may contain a slash
                return action, {name: unquote(value) for name, value in match.groupdict().items() if value}
        raise HubError(404, "NotFound", f"No route for {self.command} {path}")

    def _check_token(self) -> None:
        """Reading is free. With any other message the client takes a 401 for a missing repository."""
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise HubError(401, "Unauthorized", "Invalid credentials in Authorization header")

    def _body_parts(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (part := self.rfile.read(min(left, COPY_SIZE))):
            left -= len(part)
            yield part

    def _read_json(self) -> dict:
        return json.loads(b"".join(self.body) or b"{}")

    def _send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self._send_headers(status, {"Content-Type": "application/json", **(headers or {})}, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_headers(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def _repository(self, name: str) -> Repository:
        if name not in self.hub.repositories:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.hub.repositories[name]

    def _files(self, name: str, revision: str) -> tuple[str, Files]:
        repository = self._repository(name)
        commit = repository.find_commit(revision)
        return commit, repository.commits[commit]

    def create_repository(self) -> None:
        request = self._read_json()
        name = f"{request.get('organization') or self.hub.user}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        with self.hub.write_lock:
            if name in self.hub.repositories:
                # the client reads the url from this answer too, when the caller said exist_ok
                return self._send_json({**answer, "error": "You already created this model repo"}, 409)
            self.hub.repositories[name] = self.hub.new_repository()
        self._send_json(answer)

    def create_branch(self, repository: str, branch: str) -> None:
        start = self._read_json().get("startingPoint") or "main"
        found = self._repository(repository)
        with self.hub.write_lock:
            if branch in found.branches:
                raise HubError(409, "Conflict", "Reference already exists")
            found.branches[branch] = found.find_commit(start)
        self._send_json({})

    def validate_card(self) -> None:
        """The client asks before it uploads a README.md."""
        self._send_json({"errors": [], "warnings": []})

    def model_info(self, repository: str, revision: str = "main") -> None:
        commit, files = self._files(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._send_json({"id": repository, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def list_tree(self, repository: str, revision: str, folder: str = "") -> None:
        """Files only: the client skips the folders of a listing wherever it asks for one."""
        _, files = self._files(repository, revision)
        prefix = f"{folder}/" if folder else ""
        paths = [path for path in sorted(files) if path.startswith(prefix)]
        if folder and not paths:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true"
        if not recursive:
            paths = [path for path in paths if "/" not in path.removeprefix(prefix)]
        self._send_json([_tree_entry(path, files[path]) for path in paths])

    def choose_upload_modes(self, repository: str, revision: str) -> None:
        _, files = self._files(repository, revision)
        answers = []
        for announced in self._read_json()["files"]:
            path = announced["path"]
            is_lfs = path.endswith(LFS_SUFFIXES) or announced["size"] > LFS_SIZE
            answers.append(
                {
                    "path": path,
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "oid": files[path].compared_oid if path in files else None,
                }
            )
        self._send_json({"files": answers})

    def announce_lfs_objects(self, repository: str) -> None:
        """Tell where to upload each object. One without actions is here already, and the client leaves it out."""
        self._repository(repository)
        objects = []
        for announced in self._read_json()["objects"]:
            answer = {"oid": announced["oid"], "size": announced["size"]}
            if not self.hub.content_path(announced["oid"]).exists():
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{announced['oid']}"}}
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def receive_lfs_object(self, oid: str) -> None:
        """Written under another name first, so that an object either is complete or does not exist."""
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.hub.root, delete=False) as upload:
            for part in self.body:
                digest.update(part)
                upload.write(part)
        if digest.hexdigest() != oid:
            os.remove(upload.name)
            raise HubError(400, "BadRequest", "The content does not have the announced sha256")
        os.replace(upload.name, self.hub.content_path(oid))
        self._send_json({})

    def commit(self, repository: str, branch: str) -> None:
        found = self._repository(repository)
        operations = [json.loads(line) for line in b"".join(self.body).splitlines()]
        with self.hub.write_lock:
            if branch not in found.branches:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
            files = dict(found.commits[found.branches[branch]])
            for operation in operations:
                self._apply_operation(files, operation["key"], operation["value"])
            commit = found.add_commit(branch, files)
        url = f"{self.hub.url}/{repository}/commit/{commit}"
        self._send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _apply_operation(self, files: Files, kind: str, value: dict) -> None:
        path = value.get("path", "")
        if kind == "file":
            files[path] = self.hub.store_content(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            files[path] = self.hub.stored_lfs_file(value["oid"])
        elif kind == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
        elif kind == "deletedFolder":
            for inside in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[inside]
        elif kind != "header":  # the commit message, which nothing reads back
            raise HubError(400, "BadRequest", f"Unknown operation {kind}")

    def download(self, repository: str, revision: str, path: str) -> None:
        commit, files = self._files(repository, revision)
        if path not in files:
            # with the commit in the answer the client remembers that the file does not exist
            raise HubError(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        file = files[path]
        headers = {"ETag": f'"{file.git_oid}"', "X-Repo-Commit": commit}
        if file.is_lfs:  # the ETag the client files the content under
            headers.update({"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)})
        self._send_headers(200, headers, file.size)
        if self.command == "GET":
            with self.hub.content_path(file.sha256).open("rb") as content:
                shutil.copyfileobj(content, self.wfile, COPY_SIZE)


REPOSITORY = "(?P<repository>[^/]+/[^/]+)"
REVISION = "(?P<revision>[^/]+)"
BRANCH = "(?P<branch>[^/]+)"
OID = "(?P<oid>[0-9a-f]{64})"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", HubRequestHandler.create_repository),
    ("POST", "/api/validate-yaml", HubRequestHandler.validate_card),
    ("GET", f"/api/models/{REPOSITORY}", HubRequestHandler.model_info),
    ("GET", f"/api/models/{REPOSITORY}/revision/{REVISION}", HubRequestHandler.model_info),
    ("GET", f"/api/models/{REPOSITORY}/tree/{REVISION}(?:/(?P<folder>.+))?", HubRequestHandler.list_tree),
    ("POST", f"/api/models/{REPOSITORY}/branch/{BRANCH}", HubRequestHandler.create_branch),
    ("POST", f"/api/models/{REPOSITORY}/preupload/{REVISION}", HubRequestHandler.choose_upload_modes),
    ("POST", f"/{REPOSITORY}[.]git/info/lfs/objects/batch", HubRequestHandler.announce_lfs_objects),
    ("PUT", f"/lfs/{OID}", HubRequestHandler.receive_lfs_object),
    ("POST", f"/api/models/{REPOSITORY}/commit/{BRANCH}", HubRequestHandler.commit),
    ("GET", f"/{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)", HubRequestHandler.download),
]
