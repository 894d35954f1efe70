"""A Hugging Face Hub on 127.0.0.1, as small as `push_to_hub` and `from_pretrained` allow. Standard library only.

    with HubServer(folder) as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(home)}, check=True)

Models only; small files are uploaded inside the commit, large ones through Git LFS. The client has to run in a process
of its own, because huggingface_hub reads its endpoint from the environment once, when it is imported.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
LFS_SIZE = 10 * 1024 * 1024  # larger files go through LFS whatever their name, as on the real Hub


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
    """Each commit is a whole listing: nothing asks for history, only for the files at a revision."""

    def __init__(self):
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.add_commit("main", {})

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
        partial = self.root / f"{sha256}.{threading.get_ident()}"
        partial.write_bytes(content)
        partial.replace(self.content_path(sha256))  # at once: another request may be reading the same content
        return StoredFile(sha256, len(content), _git_oid(content), is_lfs=False)

    def find_lfs_file(self, sha256: str) -> StoredFile:
        """The file as git sees it, which holds a pointer to the content uploaded before."""
        if not self.content_path(sha256).exists():
            raise HubError(400, "BadRequest", f"LFS object {sha256} was not uploaded")
        size = self.content_path(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return StoredFile(sha256, size, _git_oid(pointer.encode()), is_lfs=True)


class _Server(ThreadingHTTPServer):
    hub: HubServer


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(path: str, file: StoredFile) -> dict:
    lfs = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.is_lfs else {}
    return {"type": "file", "path": path, "size": file.size, "oid": file.git_oid, **lfs}


class HubRequestHandler(BaseHTTPRequestHandler):
    """Finds the method for a request in `ROUTES`. HTTP/1.0, so that no connection outlives the server."""

    server: _Server

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub

    def log_message(self, *arguments: object) -> None:
        """Keep the output of the tests clean."""

    def answer_request(self) -> None:
        # read before anything can fail: closing a connection with unread bytes may cost the client the answer
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            action, values = self._find_route()
            self._check_token(action)
            action(self, **values)
        except HubError as error:
            self._send_json({"error": str(error)}, error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer_request

    def _find_route(self) -> tuple[Callable[..., None], dict[str, str]]:
        method = "GET" if self.command == "HEAD" else self.command
        path = urlsplit(self.path).path
        for route_method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and route_method == method:
                # unquoted only now: a quoted branch name may contain a slash
                return action, {name: unquote(value) for name, value in match.groupdict().items() if value}
        raise HubError(404, "NotFound", f"No route for {self.command} {path}")

    def _check_token(self, action: Callable[..., None]) -> None:
        """Reading is free, and so is validating a card, for which the client sends no token."""
        free = self.command != "POST" or action is HubRequestHandler.validate_card
        if not free and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            # these very words: with others the client takes a 401 for a missing repository
            raise HubError(401, "Unauthorized", "Invalid credentials in Authorization header")

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

    def _files(self, repository: str, revision: str) -> tuple[str, Files]:
        found = self._repository(repository)
        commit = found.find_commit(revision)
        return commit, found.commits[commit]

    def create_repository(self) -> None:
        request = json.loads(self.body)
        name = f"{request.get('organization') or self.hub.user}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        with self.hub.write_lock:
            exists = name in self.hub.repositories
            if not exists:
                self.hub.repositories[name] = Repository()
        # with exist_ok=True the client reads the url from the refusal too, so it is no HubError
        self._send_json(answer, 409 if exists else 200)

    def create_branch(self, repository: str, branch: str) -> None:
        found = self._repository(repository)
        start = json.loads(self.body).get("startingPoint", "main")
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
        """Files only: downloads have no use for the folders of a listing."""
        _, files = self._files(repository, revision)
        prefix = f"{folder}/" if folder else ""
        paths = [path for path in sorted(files) if path.startswith(prefix)]
        if folder and not paths:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        if parse_qs(urlsplit(self.path).query).get("recursive") != ["true"]:
            paths = [path for path in paths if "/" not in path.removeprefix(prefix)]
        self._send_json([_tree_entry(path, files[path]) for path in paths])

    def choose_upload_modes(self, repository: str, revision: str) -> None:
        _, files = self._files(repository, revision)
        answers = []
        for announced in json.loads(self.body)["files"]:
            path = announced["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or announced["size"] > LFS_SIZE else "regular"
            oid = files[path].compared_oid if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answers})

    def announce_lfs_objects(self, repository: str) -> None:
        """Tell where to upload each object. One without actions is here already, and the client leaves it out."""
        self._repository(repository)
        objects = []
        for announced in json.loads(self.body)["objects"]:
            answer = {"oid": announced["oid"], "size": announced["size"]}
            if not self.hub.content_path(announced["oid"]).exists():
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{announced['oid']}"}}
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def receive_lfs_object(self, oid: str) -> None:
        if self.hub.store_content(self.body).sha256 != oid:
            raise HubError(400, "BadRequest", "The content does not have the announced sha256")
        self._send_json({})

    def commit(self, repository: str, branch: str) -> None:
        found = self._repository(repository)
        operations = [json.loads(line) for line in self.body.splitlines()]
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
        if kind == "file":
            files[value["path"]] = self.hub.store_content(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            files[value["path"]] = self.hub.find_lfs_file(value["oid"])
        elif kind != "header":  # the commit message, which nothing reads back
            raise HubError(400, "BadRequest", f"This server does not understand the operation {kind}")

    def download(self, repository: str, revision: str, path: str) -> None:
        commit, files = self._files(repository, revision)
        if path not in files:
            # with the commit in the answer the client remembers that the file does not exist
            raise HubError(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        file = files[path]
        headers = {"ETag": f'"{file.git_oid}"', "X-Repo-Commit": commit}
        if file.is_lfs:  # the client files the content under this one
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        self._send_headers(200, headers, file.size)
        if self.command == "GET":
            with self.hub.content_path(file.sha256).open("rb") as content:
                shutil.copyfileobj(content, self.wfile)


REPOSITORY = "(?P<repository>[^/]+/[^/]+)"
REVISION = "(?P<revision>[^/]+)"
BRANCH = "(?P<branch>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", HubRequestHandler.create_repository),
    ("POST", "/api/validate-yaml", HubRequestHandler.validate_card),
    ("GET", f"/api/models/{REPOSITORY}", HubRequestHandler.model_info),
    ("GET", f"/api/models/{REPOSITORY}/revision/{REVISION}", HubRequestHandler.model_info),
    ("GET", f"/api/models/{REPOSITORY}/tree/{REVISION}(?:/(?P<folder>.+))?", HubRequestHandler.list_tree),
    ("POST", f"/api/models/{REPOSITORY}/branch/{BRANCH}", HubRequestHandler.create_branch),
    ("POST", f"/api/models/{REPOSITORY}/preupload/{REVISION}", HubRequestHandler.choose_upload_modes),
    ("POST", f"/{REPOSITORY}[.]git/info/lfs/objects/batch", HubRequestHandler.announce_lfs_objects),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", HubRequestHandler.receive_lfs_object),
    ("POST", f"/api/models/{REPOSITORY}/commit/{BRANCH}", HubRequestHandler.commit),
    ("GET", f"/{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)", HubRequestHandler.download),
]
