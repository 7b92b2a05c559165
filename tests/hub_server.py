"""A Hugging Face Hub on the loopback, for the unmodified clients huggingface_hub, transformers and datasets.

    with HubServer(token="hf_test", user="tester") as hub:
        subprocess.run(command, env=hub.environment(tmp_path))
        assert hub.files("tester/model")["config.json"] == expected and not hub.problems

What a test against it proves: a push makes the Hub's calls, and commits only LFS objects that were uploaded, with the
announced sha256 and size; the token is right, and never sent to the storage; nothing is written outside the user's
namespace; the card has the keys and scores that the Hub reads; a load at a pinned revision gets the bytes of that
commit, and an error where it is gone; what a client does when a step is refused or the connection breaks (`fail`).

What only the real Hub can prove: Xet storage, multipart uploads, redirects to a CDN, rate limits, git itself,
branches, tags, gated repositories, organizations and token scopes, the YAML schema of the card in full, its rendering.
"""

import base64
import fnmatch
import hashlib
import json
import math
import os
import re
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results


LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.png", "*.parquet", "*tfevents*")
LFS_SIZE = 10_000_000  # bytes; the Hub takes no larger regular file
CARD_KEYS = ("language", "license", "library_name", "pipeline_tag", "metrics", "tags", "model-index")
YAML_BLOCK = re.compile(r"^\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
# By this text the client distinguishes a bad token from a missing repository
BAD_TOKEN = "Invalid credentials in Authorization header"

ID = r"(?P<id>[\w.-]+(?:/[\w.-]+)?)"
API = rf"/api/(?P<kind>model|dataset)s/{ID}"
GIT = rf"/(?:(?P<kind>dataset)s/)?{ID}"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = (  # methods, path, step (the name that `fail` takes), method of `_Handler`; the first match counts
    ("POST", r"/api/repos/create", "create", "_create"),
    ("POST", r"/api/validate-yaml", "validate", "_validate"),
    ("POST", rf"{API}/preupload/{REVISION}", "preupload", "_preupload"),
    ("POST", rf"{GIT}\.git/info/lfs/objects/batch", "batch", "_batch"),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "upload", "_upload"),
    ("POST", rf"{API}/commit/{REVISION}", "commit", "_commit"),
    ("GET", rf"{API}/revision/{REVISION}", "info", "_info"),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.+))?", "tree", "_tree"),
    ("POST", rf"{API}/paths-info/{REVISION}", "tree", "_paths_info"),
    ("GET", API, "info", "_info"),
    ("HEAD GET", rf"{GIT}/resolve/{REVISION}/(?P<path>.+)", "resolve", "_resolve"),
)
NEEDS_TOKEN = {"create", "preupload", "batch", "commit"}


class Refusal(Exception):
    """An error as an answer, in the headers and the body that the Hub uses."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None, **body):
        line = " ".join(message.split()).encode("latin-1", "replace").decode("latin-1")
        self.status = status
        self.headers = {"X-Error-Message": line} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        # The client reads "errors" of a refused card
        self.body = {"error": message, "errors": [{"message": message}], "warnings": []} | body


@dataclass(frozen=True)
class Commit:
    message: str
    files: dict[str, bytes]
    oid: str = field(default_factory=lambda: secrets.token_hex(20))

    def paths(self) -> set[str]:
        """Return all files and folders."""
        return {str(p) for path in self.files for p in (path, *PurePosixPath(path).parents)} - {"."}

    def entry(self, path: str) -> dict:
        """Describe a file or a folder as the endpoints "tree" and "paths-info" do."""
        if path not in self.files:
            return {"type": "directory", "oid": blob_oid(path.encode()), "size": 0, "path": path}
        content, size = self.files[path], len(self.files[path])
        entry = {"type": "file", "oid": blob_oid(content), "size": size, "path": path}
        if is_lfs(path, content, size):
            oid = sha256(content)
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
            entry |= {"oid": blob_oid(pointer), "lfs": {"oid": oid, "size": size, "pointerSize": len(pointer)}}
        return entry

    def etag(self, path: str) -> str:
        """Return what identifies contents to a client: the sha256 of an LFS object, or the sha1 of a git blob."""
        entry = self.entry(path)
        return entry.get("lfs", entry)["oid"]


@dataclass
class Repository:
    id: str
    kind: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)

    @property
    def path(self) -> str:
        return f"datasets/{self.id}" if self.kind == "dataset" else self.id

    def at(self, revision: str) -> Commit:
        for commit in reversed(self.commits):
            if revision in ("main", commit.oid):
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class HubServer:
    """The state, and what tests do with it; see the module's docstring."""

    def __init__(self, token: str = "hf_test", user: str = "tester"):
        self.token, self.user = token, user
        self.reset()
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def reset(self) -> None:
        """Forget all repositories, requests and faults."""
        self.requests: list[tuple[str, str]] = []  # method, path without query
        self.received: list[bytes] = []  # bodies and query strings, and what was base64 in them
        self.problems: list[str] = []  # violations of the protocol; a push that went well leaves none
        self.repositories: dict[tuple[str, str], Repository] = {}  # by kind and id
        self.objects: dict[str, bytes] = {}  # LFS objects by sha256
        self.announced: dict[str, tuple[int, str]] = {}  # size and signature of those that may be uploaded
        self.faults: dict[str, Iterator[Refusal | str]] = {}  # by step, the answers to come
        self.replaced: dict[str, bytes] = {}  # by path, what is served instead of the file of the commit

    def __enter__(self) -> "HubServer":
        # `shutdown` waits for the next poll
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: str | Path) -> dict[str, str]:
        """Return this environment without any setting of the Hub's clients, with this server and a cache in `home`."""
        theirs = re.compile("HF_|HUGGING|(TRANSFORMERS|DATASETS)_(OFFLINE|CACHE)")
        ours = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HOME": str(Path(home) / "huggingface")}
        ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        ours |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        return {name: value for name, value in os.environ.items() if not theirs.match(name)} | ours

    def add_repository(self, id: str, files: dict[str, bytes], kind: str = "model", private: bool = False) -> str:
        """Make a repository, or a new commit of it, whose tree is exactly `files`; return the commit's hash."""
        with self.lock:
            repository = self.repositories.setdefault((kind, id), Repository(id, kind, private))
            self.objects |= {sha256(content): content for content in files.values()}
            repository.commits.append(Commit("Add files", dict(files)))
            return repository.commits[-1].oid

    def drop_history(self, id: str, kind: str = "model") -> None:
        """Forget every commit but the last, as after a force push."""
        with self.lock:
            del self.repositories[kind, id].commits[:-1]

    def files(self, id: str, kind: str = "model") -> dict[str, bytes]:
        return dict(self.repositories[kind, id].commits[-1].files)

    def commits(self, id: str, kind: str = "model") -> list[Commit]:
        """Return the commits, oldest first; the first of a created repository is the Hub's own: .gitattributes."""
        return list(self.repositories[kind, id].commits)

    def fail(
        self, step: str, status: int | str, times: int | None = None, message: str = "", headers: dict | None = None
    ) -> None:
        """Answer `status` at `step` or "any", `times` times or until `heal`.

        "drop" hangs up within the body, "silent" answers nothing, "slow" takes two seconds for the body.
        """
        assert step in {route[2] for route in ROUTES} | {"any"}, step
        text = message or (BAD_TOKEN if status == 401 else f"Fault at {step}")
        fault = status if isinstance(status, str) else Refusal(status, text, headers=headers)
        self.faults[step] = repeat(fault) if times is None else repeat(fault, times)

    def heal(self) -> None:
        self.faults.clear()


class _Handler(BaseHTTPRequestHandler):
    """The protocol: a method for each route, which returns the body of its answer, and its headers if any."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the body waits 40 ms for the acknowledgement of the headers

    def _handle(self) -> None:
        hub, (path, _, query) = self.hub, self.path.partition("?")
        found = ((*route[2:], re.fullmatch(route[1], path)) for route in ROUTES if self.command in route[0])
        step, route, match = next((route for route in found if route[2]), ("", "", None))
        self.args = {key: unquote(value or "") for key, value in match.groupdict().items()} if match else {}
        self.authorized = self.headers.get("Authorization") == f"Bearer {hub.token}"
        fault = next(chain(hub.faults.get(step, ()), hub.faults.get("any", ())), None)
        length = int(self.headers.get("Content-Length", 0))
        self.query, self.content = parse_qs(query), self.rfile.read(length // 2 if fault == "drop" else length)
        hub.requests.append((self.command, path))
        hub.received.extend(filter(None, (unquote(query).encode(), self.content)))
        if fault == "drop" or len(self.content) < length:  # the second: the client has gone
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "silent":
            self.connection.recv(1)  # until the client gives up
            self.close_connection = True
            return
        self.pause = 0.2 if fault == "slow" else 0
        try:
            with hub.lock:
                body, headers = self._answer(step, route, None if fault == "slow" else fault)
            self._send(206 if "Content-Range" in headers else 200, body, headers)
        except Refusal as refusal:
            self._send(refusal.status, refusal.body, refusal.headers)
        except ConnectionError:
            self.close_connection = True
        except Exception:  # a request that is not implemented here
            hub.problems.append(traceback.format_exc())
            self._send(500, {"error": "Internal Error"}, {})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _send(self, status: int, body: bytes | dict | list, headers: dict[str, str]) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body, default=str).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json; charset=utf-8"
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(content), len(content) // 10 or 1) if self.command != "HEAD" else ():
            time.sleep(self.pause)
            self.wfile.write(content[start : start + (len(content) // 10 or 1)])

    def log_message(self, *args) -> None: ...

    def _answer(self, step: str, route: str, fault: Refusal | None) -> tuple[bytes | dict | list, dict[str, str]]:
        if fault:
            raise fault
        if not route:
            raise self._violation(404, f"Unknown request: {self.command} {self.path}")
        sent = "Authorization" in self.headers
        if step == "upload" and sent:  # the storage is another host; its addresses are signed instead
            self.hub.problems.append("The token was sent to the storage")
        elif step != "upload" and not self.authorized and (sent or step in NEEDS_TOKEN):
            raise self._violation(401, BAD_TOKEN, f"{'Wrong' if sent else 'Missing'} token at {step}")
        answer = getattr(self, route)()
        return answer if isinstance(answer, tuple) else (answer, {})

    def _violation(self, status: int, message: str, problem: str = "") -> Refusal:
        self.hub.problems.append(problem or message)
        return Refusal(status, message)

    def _repository(self, write: bool = False) -> Repository:
        id = self.args["id"]
        repository = self.hub.repositories.get((self.args["kind"] or "model", id))
        if repository is None or (repository.private and not self.authorized):
            raise Refusal(404 if self.authorized else 401, "Repository not found", "RepoNotFound")
        if write and id.split("/")[0] != self.hub.user:
            raise Refusal(403, f"{self.hub.user} may not write to {id}")
        return repository

    def _revision(self) -> Commit:
        return self._repository().at(self.args.get("revision", "main"))

    def _create(self) -> dict:
        payload = json.loads(self.content)
        owner = payload.get("organization") or self.hub.user
        if owner != self.hub.user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        private = payload.get("private") is True or payload.get("visibility") == "private"
        repository = Repository(f"{owner}/{payload['name']}", "model", private)
        url = f"{self.hub.url}/{repository.path}"
        if ("model", repository.id) in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", url=url)
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        repository.commits.append(Commit("initial commit", {".gitattributes": attributes.encode()}))
        self.hub.repositories["model", repository.id] = repository
        return {"url": url, "name": repository.id, "id": secrets.token_hex(12), "private": private}

    def _validate(self) -> dict:
        if errors := card_errors(json.loads(self.content)["content"]):
            raise Refusal(400, "Invalid metadata in README.md", errors=[{"message": error} for error in errors])
        return {"errors": [], "warnings": []}

    def _preupload(self) -> dict:
        head = self._repository(write=True).at(self.args["revision"])
        files = []
        for file in json.loads(self.content)["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            self.hub.received.append(sample)
            mode = "lfs" if is_lfs(path, sample, file["size"]) else "regular"
            known = {"oid": head.etag(path)} if path in head.files else {}  # the client leaves out what is the same
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
        return {"files": files, "commitOid": head.oid}

    def _batch(self) -> dict:
        self._repository(write=True)
        objects = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(self.content)["objects"]]
        for item in objects:
            oid = item["oid"]
            if oid not in self.hub.objects:
                # Two files with the same bytes are two items, and the address of neither voids that of the other
                signature = self.hub.announced.setdefault(oid, (item["size"], secrets.token_hex()))[1]
                item["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{oid}?signature={signature}"}}
        return {"transfer": "basic", "objects": objects}

    def _upload(self) -> bytes:
        oid, found = self.args["oid"], sha256(self.content)
        size, signature = self.hub.announced.get(oid, (0, ""))
        if self.query.get("signature") != [signature]:
            raise self._violation(403, f"Upload of {oid} to an address that was not handed out")
        if (oid, size) != (found, len(self.content)):
            raise self._violation(400, f"Upload of {oid}, {size} bytes, brought {len(self.content)} of sha256 {found}")
        self.hub.objects[oid] = self.content
        return b""

    def _commit(self) -> dict:
        repository = self._repository(write=True)
        head = repository.at(self.args["revision"])
        header, *operations = (json.loads(line) for line in self.content.splitlines())
        if {head.oid, header["value"].get("parentCommit", head.oid)} != {repository.commits[-1].oid}:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            self._apply(operation["key"], operation["value"], files)
        card = files.get("README.md")
        if card and card != head.files.get("README.md"):
            for error in card_errors(card.decode()):
                raise self._violation(400, f"README.md of a commit: {error}")
        commit = Commit(header["value"]["summary"], files)
        repository.commits.append(commit)
        url = f"{self.hub.url}/{repository.path}/commit/{commit.oid}"
        return {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""}

    def _apply(self, key: str, value: dict, files: dict[str, bytes]) -> None:
        """Do one operation of a commit to `files`."""
        path, oid = value["path"], value.get("oid")
        if key == "file":
            content = files[path] = base64.b64decode(value["content"])
            self.hub.received.append(content)
            if is_lfs(path, content, len(content)):
                raise self._violation(400, f"Commit of {path} as a regular file, which must be an LFS object")
        elif key == "lfsFile":
            if oid not in self.hub.objects or value.get("size") != len(self.hub.objects[oid]):
                raise self._violation(400, f"Commit of {path}, whose LFS object {oid} was not uploaded")
            files[path] = self.hub.objects[oid]
        elif key == "deletedFile":
            del files[path]
        else:
            raise self._violation(400, f"Unknown operation in a commit: {key}")

    def _info(self) -> dict:
        repository, commit = self._repository(), self._revision()
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        info = {"_id": "0", "id": repository.id, "sha": commit.oid, "private": repository.private, "gated": False}
        return info | {"tags": [], "siblings": siblings}

    def _tree(self) -> list:
        commit, folder = self._revision(), self.args["path"]
        prefix = folder.strip("/") + "/" if folder else ""
        below = sorted(path for path in commit.paths() if path.startswith(prefix))
        if folder and not below:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        recursive = self.query.get("recursive") == ["true"]
        return [commit.entry(path) for path in below if recursive or "/" not in path[len(prefix) :]]

    def _paths_info(self) -> list:
        commit, paths = self._revision(), parse_qs(self.content.decode())["paths"]
        return [commit.entry(path) for path in paths if path in commit.paths()]

    def _resolve(self) -> tuple[bytes, dict[str, str]]:
        commit, path = self._revision(), self.args["path"]
        if path not in commit.files:
            # Clients remember it by the commit
            raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})
        content, etag = self.hub.replaced.get(path, commit.files[path]), f'"{commit.etag(path)}"'
        headers = {"X-Repo-Commit": commit.oid, "ETag": etag, "Accept-Ranges": "bytes"}
        if is_lfs(path, content, len(content)):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return content, headers
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if start >= stop:
            raise Refusal(416, "Range not satisfiable")
        return content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, sample: bytes, size: int) -> bool:
    """Say how a file is stored; only the first 512 bytes of `sample` count, as a client sends no more."""
    binary = b"\0" in sample[:512] or any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)
    return size > LFS_SIZE or (binary and size > 0)  # the client makes no LFS objects of empty files


def card_errors(content: str) -> list[str]:
    """Return what is wrong with a card: its YAML, keys that it lacks, scores that the Hub would not read."""
    try:
        block = YAML_BLOCK.match(content)
        data = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError:  # the tag of a Python object, too
        data = None
    if not isinstance(data, dict):
        return ["there is no YAML block with a mapping that can be read"]
    errors = [f'"{key}" is required' for key in CARD_KEYS if not data.get(key)]
    base = data.get("base_model")
    if base and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        errors.append(f'"base_model" is not a model id: {base!r}')
    try:
        results = model_index_to_eval_results(data["model-index"])[1] if data.get("model-index") else []
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return [*errors, f'"model-index" cannot be read: {error!r}']
    for result in results:
        for key in ("task_type", "dataset_type", "dataset_name", "metric_type"):
            if not isinstance(getattr(result, key), str):
                errors.append(f'"{key}" of a result of "model-index" is required')
        value = result.metric_value
        if type(value) not in (int, float) or not math.isfinite(value):
            errors.append(f'"value" of a metric of "model-index" must be a number, not {value!r}')
    return errors
