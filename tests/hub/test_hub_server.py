"""The Hub of `hub_server` answers the unmodified clients as the real one does, and records violations of its protocol.

The clients read their settings once, so each runs in a process of its own.
"""

import http.client
import json
import subprocess
import sys

import numpy as np
import pytest
from hub_server import HubServer, sha256


CARD = {
    "language": "en",
    "license": "bsd-3-clause",
    "library_name": "transformers",
    "pipeline_tag": "image-to-text",
    "base_model": "Salesforce/tiny",
    "datasets": ["tester/set"],
    "metrics": ["rouge"],
    "tags": ["radiology"],
    "model-index": [
        {
            "name": "model",
            "results": [
                {
                    "task": {"type": "image-to-text"},
                    "dataset": {"type": "tester/set", "name": "Set"},
                    "metrics": [{"type": "rouge", "value": 0.15}],
                }
            ],
        }
    ],
}


@pytest.fixture
def hub():
    with HubServer(token="hf_test", user="tester") as server:
        yield server


def card(**changes) -> str:
    """JSON is YAML, too."""
    return f"---\n{json.dumps(CARD | changes)}\n---\n# A model\n"


def client(hub, tmp_path, script: str, **environment) -> str:
    """Run `script` as a client of `hub` in `tmp_path`; return what it prints."""
    names = "create_repo, get_paths_info, hf_hub_download, model_info, snapshot_download, upload_folder"
    head = f"import os, shutil\nfrom pathlib import Path\nfrom huggingface_hub import {names}\n"
    head += "from huggingface_hub.errors import *\n"
    command = [sys.executable, "-W", "error::UserWarning", "-c", head + script]
    run = subprocess.run(
        command, env=hub.environment(tmp_path) | environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def raw(hub, method: str, path: str, body: bytes | dict = b"", token: str | None = "hf_test", **headers):
    """Send one request without a client; return the status, the headers and the body."""
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers)
    response = connection.getresponse()
    answer = response.status, response.headers, response.read()
    connection.close()
    return answer


@pytest.fixture
def folder(tmp_path):
    """Make the folder of a model, with a large file of a nested folder among others."""
    weights = np.random.default_rng(0).bytes(300_000)
    files = {"config.json": b"{}", "README.md": card().encode(), "model.safetensors": weights, "empty.bin": b""}
    files |= {"runs/a/events.out.tfevents.1": b"\0events", "runs/a/notes.txt": ("long " * 200 + "Größe").encode()}
    for path, content in files.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(content)
    return files


def test_a_push_and_its_download_agree_in_every_byte(hub, tmp_path, folder):
    hub.fail("upload", "drop", times=1)  # the client tries again
    script = """
print(create_repo("model", private=True))  # without a namespace: the user's
first = upload_folder(repo_id="tester/model", folder_path="folder", commit_message="First")
try:
    create_repo("tester/model")
except HfHubHTTPError as error:
    print(error.response.status_code, error.response.json()["error"])
create_repo("tester/model", exist_ok=True)
again = upload_folder(repo_id="tester/model", folder_path="folder")
assert again.oid == first.oid, "nothing had changed"
Path("folder/config.json").write_text('{"a": 1}')
shutil.rmtree("folder/runs")
second = upload_folder(repo_id="tester/model", folder_path="folder", commit_message="Second", delete_patterns="runs/*")
for revision in (first.oid, "main"):
    assert Path(hf_hub_download("tester/model", "config.json", revision=revision)).read_text() == (
        "{}" if revision == first.oid else '{"a": 1}'
    )
snapshot_download("tester/model", local_dir="copy")
try:
    hf_hub_download("tester/model", "absent.json")
except EntryNotFoundError as error:
    print(type(error).__name__)
info = model_info("tester/model")
assert info.sha == second.oid and info.tags == ["license:bsd-3-clause"] and info.private
(weights,) = get_paths_info("tester/model", ["model.safetensors", "absent"], expand=True)
print(weights.lfs.sha256)
"""
    printed = client(hub, tmp_path, script).split("\n")
    assert printed[:3] == [
        f"{hub.url}/tester/model",
        "409 You already created this model repo",
        "RemoteEntryNotFoundError",
    ]
    assert printed[3] == sha256(folder["model.safetensors"])

    initial, first, second = hub.commits("tester/model")
    assert (initial.message, first.message, second.message) == ("initial commit", "First", "Second")
    assert first.files == folder | initial.files
    large = {path for path, content in folder.items() if sha256(content) in hub.objects}
    assert large == {"model.safetensors", "runs/a/events.out.tfevents.1"}
    expected = {path: content for path, content in first.files.items() if "runs" not in path}
    expected["config.json"] = b'{"a": 1}'
    assert hub.files("tester/model") == expected
    copies = [path for path in (tmp_path / "copy").rglob("*") if path.is_file() and ".cache" not in path.parts]
    assert {str(path.relative_to(tmp_path / "copy")): path.read_bytes() for path in copies} == expected
    assert hub.problems == []
    assert sum(method == "PUT" for method, _ in hub.requests) == 3
    assert folder["model.safetensors"] in hub.received
    assert any("Größe".encode() in body for body in hub.received)
    assert not any(b"hf_test" in body for body in hub.received)


def test_writes_need_the_token_and_the_namespace_of_the_user(hub, tmp_path):
    hub.add_repository("Salesforce/tiny", {"config.json": b"{}"})
    hub.add_repository("tester/private", {"config.json": b"{}"}, private=True)
    script = """
for repository in ("tester/model", "Salesforce/other"):
    try:
        create_repo(repository, token="hf_wrong" if "tester" in repository else None)
    except HfHubHTTPError as error:
        print(error.response.status_code, error.server_message)
try:
    upload_folder(repo_id="Salesforce/tiny", folder_path=".")
except HfHubHTTPError as error:
    print(error.response.status_code)
for token in (None, False):
    try:
        print(model_info("tester/private" if token is False else "tester/none", token=token))
    except RepositoryNotFoundError as error:
        print(error.response.status_code)
"""
    (tmp_path / "file.txt").write_text("text")
    printed = client(hub, tmp_path, script).splitlines()
    assert printed[0] == "401 Invalid credentials in Authorization header"
    assert printed[1].startswith("403 You don't have the rights")
    assert printed[2:] == ["403", "404", "401"]
    assert hub.problems == ["Wrong token at create"]
    assert ("model", "tester/model") not in hub.repositories


def test_uploads_and_commits_that_break_the_protocol_are_recorded(hub):
    hub.add_repository("tester/model", {"config.json": b"{}"})
    oid = sha256(b"whole")

    def upload(body: bytes, token: str | None = None) -> int:
        batch = {"objects": [{"oid": oid, "size": 5}]}
        objects = json.loads(raw(hub, "POST", "/tester/model.git/info/lfs/objects/batch", batch)[2])["objects"]
        return raw(hub, "PUT", objects[0]["actions"]["upload"]["href"].removeprefix(hub.url), body, token)[0]

    def commit(key: str, **value) -> int:
        lines = [{"key": "header", "value": {"summary": "Raw"}}, {"key": key, "value": value}]
        body = "\n".join(json.dumps(line) for line in lines).encode()
        return raw(hub, "POST", "/api/models/tester/model/commit/main", body)[0]

    assert [upload(b"whale"), upload(b"who")] == [400, 400]
    assert raw(hub, "PUT", f"/storage/{oid}?signature=guessed", b"whole", None)[0] == 403
    assert commit("lfsFile", path="a.bin", oid=oid, size=5) == 400
    assert commit("file", path="a.bin", content="AAAA", encoding="base64") == 400
    assert commit("file", path="README.md", content="bm9uZQ==", encoding="base64") == 400
    assert raw(hub, "GET", "/api/spaces/tester/none")[0] == 404
    assert upload(b"whole", token="hf_test") == 200
    assert [problem.split(",")[0].split(" to an")[0] for problem in hub.problems] == [
        f"Upload of {oid}",
        f"Upload of {oid}",
        f"Upload of {oid}",
        "Commit of a.bin",
        "Commit of a.bin as a regular file",
        "README.md of a commit: there is no YAML block with a mapping that can be read",
        "Unknown request: GET /api/spaces/tester/none",
        "The token was sent to the storage",
    ]
    assert len(hub.commits("tester/model")) == 1
    assert commit("lfsFile", path="a.bin", oid=oid, size=5) == 200
    assert hub.files("tester/model") == {"config.json": b"{}", "a.bin": b"whole"}


def test_a_card_without_readable_scores_is_refused(hub):
    def errors(content: str, **payload) -> list[str]:
        status, _, body = raw(hub, "POST", "/api/validate-yaml", {"content": content} | payload, token=None)
        answer = json.loads(body)
        assert (status == 400) == bool(answer["errors"])
        return [error["message"] for error in answer["errors"]]

    def scores(**changes) -> str:
        index = json.loads(json.dumps(CARD["model-index"]))
        index[0]["results"][0] |= changes
        return card(**{"model-index": index})

    assert errors(card()) == []
    assert errors("# No block\n") == errors("---\n- a list\n---\n") != []
    assert errors("---\nlicense: !!python/object/apply:numpy.float64 [1]\n---\n") == errors("# No block\n")
    assert errors(card(license=None)) == ['"license" is required']
    assert errors("---\nconfigs: []\n---\n", repoType="dataset") == []
    assert errors(card(base_model="outputs/my run")) == ["\"base_model\" is not a model id: 'outputs/my run'"]
    assert errors(scores(dataset={"type": "set"})) == ["\"model-index\" cannot be read: KeyError('name')"]
    assert errors(scores(task={"type": None})) == ['"task_type" of a result of "model-index" is required']
    assert "must be a number" in errors(scores(metrics=[{"type": "rouge", "value": "0.1"}]))[0]
    assert "must be a number" in errors(scores(metrics=[{"type": "rouge", "value": True}]))[0]
    assert errors(card(**{"model-index": [{"name": "model", "results": []}]})) == []  # the Trainer's at first


def test_faults_occur_at_their_step_as_often_as_asked(hub):
    hub.add_repository("tester/model", {"config.json": b"0123456789"})
    resolve = "/tester/model/resolve/main/config.json"
    hub.fail("resolve", 503, times=2, message="Busy", headers={"Retry-After": "1"})
    status, headers, _ = raw(hub, "HEAD", resolve)
    assert (status, headers["X-Error-Message"], headers["Retry-After"]) == (503, "Busy", "1")
    assert raw(hub, "GET", "/api/models/tester/model")[0] == 200
    assert [raw(hub, "GET", resolve)[0] for _ in range(2)] == [503, 200]
    hub.fail("any", "drop")
    with pytest.raises((http.client.HTTPException, OSError)):
        raw(hub, "POST", "/api/repos/create", {"name": "model"})
    with pytest.raises((http.client.HTTPException, OSError)):
        raw(hub, "GET", resolve)
    hub.heal()
    assert raw(hub, "GET", resolve)[2] == b"0123456789"
    with pytest.raises(ValueError, match="No such step"):
        hub.fail("push", 500)
    assert hub.problems == []


def test_a_dataset_loads_at_its_pinned_commit_until_the_history_is_gone(hub, tmp_path, raw_dataset):
    def files(number: int) -> dict[str, bytes]:
        for split, rows in raw_dataset.items():
            rows.select(range(number)).to_parquet(tmp_path / split)
        data = {f"data/{split}-00000-of-00001.parquet": (tmp_path / split).read_bytes() for split in raw_dataset}
        return data | {"README.md": b"---\nlicense: mit\n---\n"}

    old = hub.add_repository("tester/set", files(5), kind="dataset")
    hub.add_repository("tester/set", files(3), kind="dataset")
    script = """
from datasets import load_dataset
rows = load_dataset("tester/set", revision=os.environ["OLD"])
print({split: len(rows[split]) for split in rows}, rows["test"][4]["image"].size)
"""
    assert client(hub, tmp_path, script, OLD=old) == "{'train': 5, 'validation': 5, 'test': 5} (40, 36)\n"
    hub.drop_history("tester/set", kind="dataset")
    script = """
for revision in (os.environ["OLD"], "main"):
    try:
        path = hf_hub_download("tester/set", "README.md", repo_type="dataset", revision=revision, cache_dir="fresh")
        print(len(Path(path).read_bytes()))
    except RevisionNotFoundError as error:
        print(error.response.status_code)
"""
    assert client(hub, tmp_path, script, OLD=old) == "404\n21\n"
    assert hub.problems == []


def test_a_range_of_a_file_is_served(hub):
    hub.add_repository("tester/model", {"a.bin": b"0123456789"})
    address = "/tester/model/resolve/main/a.bin"
    status, headers, body = raw(hub, "GET", address, Range="bytes=3-5")
    assert (status, headers["Content-Range"], body) == (206, "bytes 3-5/10", b"345")
    assert raw(hub, "GET", address, Range="bytes=10-")[0] == 416
