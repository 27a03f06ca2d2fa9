"""A server on the loopback address that speaks the Hub's HTTP API for models, Spaces and data sets, as far as the libraries use it.

Repositories live in memory. Needs the standard library and PyYAML only, so that a wrong idea of the client's cannot
hide in the server. What it does not do: git itself, xet storage, the real checks of metadata, secret scanning.

The requests and answers are those that huggingface_hub makes with `HF_HUB_DISABLE_XET=1`; `HubServer.environment` is
what a process needs to talk to it. A process under test can break it on purpose: `POST /-/fail` with
`{"method": "PUT", "path": "lfs", "status": 500, "times": 1}` answers the next requests that match with an error.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # type: ignore[import-untyped]


ROOT = Path(__file__).resolve().parents[2]
OWNER = "tester"
# made up; long enough to be taken for one
TOKEN = "hf_" + "LoopbackTestToken" * 2
LARGE = (".parquet", ".safetensors", ".bin", ".pt", ".pth", ".png", ".onnx")
MODELS = r"/api/(?P<repo>(?:models|spaces|datasets)/[^/]+/[^/]+)"


class Refusal(Exception):
    """An answer other than 200, with the headers that the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None, body: Any = None):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """SHA-256 of a large file, git's own hash of another."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(f"blob {len(self.content)}\0".encode() + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """The files after a commit."""

    sha: str
    message: str
    files: dict[str, File]


@dataclass
class Repository:
    """A repository: its commits by hash, and the commits of each branch, oldest first; of a Space, what it runs in."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    sdk: str | None = None

    def add(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        """Puts a commit on a branch."""
        seed = f"{branch} {message} {len(self.commits)} {sorted((name, file.oid) for name, file in files.items())}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), message, files)
        self.commits[commit.sha] = commit
        self.branches.setdefault(branch, []).append(commit)
        return commit

    def at(self, revision: str) -> Commit:
        """The commit that a branch or a hash names."""
        if revision in self.branches:
            return self.branches[revision][-1]
        if revision in self.commits:
            return self.commits[revision]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class HubServer:
    """The server's memory, and what a test asks about it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: list[dict[str, Any]] = []
        self.lock = threading.RLock()
        self.url = ""

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of a revision by path."""
        return {name: file.content for name, file in self.repositories[repo].at(revision).files.items()}

    def messages(self, repo: str, branch: str = "main") -> list[str]:
        """The messages of a branch's commits, oldest first."""
        return [commit.message for commit in self.repositories[repo].branches[branch]]

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a process that uses this server as the Hub, with its caches under `home`."""
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return own if token is None else own | {"HF_TOKEN": token}

    def run(
        self, code: str, folder: Path, *arguments: str, package: bool = True, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs Python code in a fresh process in `folder`; the package is on its path only if requested."""
        own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
        own |= self.environment(folder / "home") | environment
        if package:
            own["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
        done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=300)
        assert not check or done.returncode == 0, done.stderr[-4000:]
        return done


@contextmanager
def serving() -> Iterator[HubServer]:
    """A running server."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the server keeps its own list."""

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            try:
                self._fail_on_purpose(path)
                for method, pattern, name in ROUTES:
                    found = re.fullmatch(pattern, path)
                    if found and self.command in method.split("|"):
                        values = {key: unquote(value) for key, value in found.groupdict().items()}
                        # models have no kind in front of their names, here as in addresses of files
                        if "repo" in values:
                            values["repo"] = values["repo"].removeprefix("models/")
                        getattr(self, name)(**values)
                        return
                raise Refusal(404, f"no such call: {self.command} {path}")
            except Refusal as refusal:
                headers = {"X-Error-Message": refusal.message}
                if refusal.code is not None:
                    headers["X-Error-Code"] = refusal.code
                self._answer(refusal.body or {"error": refusal.message}, refusal.status, headers)

    def _answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _fail_on_purpose(self, path: str) -> None:
        for failure in self.hub.failures:
            if failure["times"] and failure["method"] == self.command and failure["path"] in path:
                failure["times"] -= 1
                raise Refusal(failure["status"], "failed on purpose")

    def _user(self) -> str | None:
        """Who asks, None for anybody."""
        sent = self.headers.get("Authorization")
        if sent is None:
            return None
        if sent != f"Bearer {TOKEN}":
            raise Refusal(401, "Invalid credentials in Authorization header")
        return OWNER

    def _repository(self, repo: str, *, write: bool = False) -> Repository:
        user, found = self._user(), self.hub.repositories.get(repo)
        if found is None or (found.private and user is None):
            # the Hub answers alike, so as not to tell which private repositories there are
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refusal(401, "Invalid username or password.")
        return found

    # --- calls -------------------------------------------------------------------------------------------------------

    def fail(self) -> None:
        self.hub.failures.append(json.loads(self.body))
        self._answer({})

    def whoami(self) -> None:
        if self._user() is None:
            raise Refusal(401, "Invalid username or password.")
        self._answer({"type": "user", "name": OWNER, "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        if self._user() is None:
            raise Refusal(401, "Invalid username or password.")
        owner = asked.get("organization") or OWNER
        if owner != OWNER:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        kind = {"space": "spaces/", "dataset": "datasets/"}.get(asked.get("type"), "")
        if kind == "spaces/" and asked.get("sdk") not in ("gradio", "docker", "static"):
            raise Refusal(400, "a Space needs an sdk")
        repo, url = f"{kind}{owner}/{asked['name']}", f"{self.hub.url}/{kind}{owner}/{asked['name']}"
        if repo in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", body={"error": "exists", "url": url})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        created = self.hub.repositories[repo] = Repository(private, sdk=asked.get("sdk"))
        created.add("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        self._answer({"url": url})

    def branch(self, repo: str, branch: str) -> None:
        found = self._repository(repo, write=True)
        if branch in found.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found.branches[branch] = [found.at(start)]
        self._answer({})

    def validate(self) -> None:
        errors = metadata_errors(json.loads(self.body)["content"])
        body = {"errors": [{"message": error} for error in errors], "warnings": []}
        if errors:
            raise Refusal(400, errors[0], body=body)
        self._answer(body)

    def preupload(self, repo: str, revision: str) -> None:
        files = self._repository(repo, write=True).at(revision).files
        self._answer(
            {
                "files": [
                    {
                        "path": asked["path"],
                        "uploadMode": "lfs" if asked["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": files[asked["path"]].oid if asked["path"] in files else None,
                    }
                    for asked in json.loads(self.body)["files"]
                ]
            }
        )

    def lfs_batch(self, repo: str) -> None:
        self._repository(repo, write=True)
        objects = json.loads(self.body)["objects"]
        for one in objects:
            if one["oid"] not in self.hub.objects:
                one["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/{one['oid']}/verify"},
                }
        self._answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content has another hash")
        self.hub.objects[oid] = self.body
        self._answer({})

    def lfs_verify(self, oid: str) -> None:
        asked = json.loads(self.body)
        if len(self.hub.objects.get(oid, b"")) != asked["size"]:
            raise Refusal(404, "no such object of that size")
        self._answer({})

    def commit(self, repo: str, revision: str) -> None:
        found = self._repository(repo, write=True)
        if revision not in found.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent, header = found.at(revision), {}
        files = dict(parent.files)
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                header = value
                if value.get("parentCommit") not in (None, parent.sha):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"the object {value['oid']} was never uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {name: file for name, file in files.items() if not name.startswith(value["path"])}
            else:
                raise Refusal(400, f"unknown operation {key}")
        made = found.add(revision, header["summary"], files)
        url = f"{self.hub.url}/{repo}/commit/{made.sha}"
        self._answer({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""})

    def information(self, repo: str, revision: str = "main") -> None:
        found = self._repository(repo)
        commit = found.at(revision)
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        name = repo.removeprefix("spaces/").removeprefix("datasets/")
        about = {"_id": "0", "id": name, "modelId": name, "sha": commit.sha, "private": found.private}
        self._answer({**about, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def tree(self, repo: str, revision: str, path: str = "") -> None:
        files = self._repository(repo).at(revision).files
        inside = {name: file for name, file in files.items() if not path or name.startswith(f"{path}/")}
        if path and not inside:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        folders = {
            str(parent) for name in inside for parent in PurePosixPath(name).parents if str(parent) not in (".", path)
        }
        entries = [_entry(name, file) for name, file in sorted(inside.items())]
        entries += [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)]
        if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() != "true":
            entries = [one for one in entries if str(PurePosixPath(one["path"]).parent) == (path or ".")]
        self._answer(entries)

    def paths(self, repo: str, revision: str) -> None:
        files = self._repository(repo).at(revision).files
        # a list in JSON, or fields of a form, which the client sends
        form = parse_qs(self.body.decode())
        asked = form["paths"] if "paths" in form else json.loads(self.body)["paths"]
        folders = [{"type": "directory", "path": name, "oid": "0" * 40} for name in asked if name not in files]
        known = [one for one in folders if any(name.startswith(f"{one['path']}/") for name in files)]
        self._answer([*known, *(_entry(name, files[name]) for name in asked if name in files)])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self._repository(repo).at(revision)
        file = commit.files.get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"}
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        self._answer(file.content, headers=headers)


def _entry(name: str, file: File) -> dict[str, Any]:
    """A file as the Hub lists it."""
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(file.content), "oid": file.oid}
    if file.large:
        entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 134}
    return entry


# method, path, name of the handler's method
ROUTES = (
    ("POST", "/-/fail", "fail"),
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", MODELS + "/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", MODELS + "/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", MODELS + "/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", MODELS, "information"),
    ("GET", MODELS + "/revision/(?P<revision>[^/]+)", "information"),
    ("GET", MODELS + "/tree/(?P<revision>[^/]+)", "tree"),
    ("GET", MODELS + "/tree/(?P<revision>[^/]+)/(?P<path>.+)", "tree"),
    ("POST", MODELS + "/paths-info/(?P<revision>[^/]+)", "paths"),
    ("POST", r"/(?P<repo>(?:spaces/|datasets/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    ("GET|HEAD", "/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)


def metadata_errors(card: str) -> list[str]:
    """What is wrong with the metadata of a model card, by the documented types of its fields.

    https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    if not found:
        return []
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be an object"]
    errors = [f'"{name}" must be a string' for name in ("library_name", "pipeline_tag") if not _is(data, name, str)]
    errors += [f'"{name}" must be a string or a list' for name in ("license", "base_model") if not _texts(data, name)]
    errors += [
        f'"{name}" must be a list of strings' for name in ("tags", "datasets", "metrics") if not _texts(data, name)
    ]
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            errors.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not isinstance(result.get(part, {}).get(key), str):
                    errors.append(f'"model-index[0].results[0].{part}.{key}" is required')
            for metric in result.get("metrics", [{}]):
                if not isinstance(metric.get("type"), str) or "value" not in metric:
                    errors.append('"model-index[0].results[0].metrics[0]" needs type and value')
    return errors


def _is(data: dict[str, Any], name: str, kind: type) -> bool:
    return name not in data or isinstance(data[name], kind)


def _texts(data: dict[str, Any], name: str) -> bool:
    value = data.get(name, [])
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))
