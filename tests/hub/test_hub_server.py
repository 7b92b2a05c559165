"""The Hub of `hub_server` refuses what the real one refuses, and records violations of its protocol.

That the unmodified clients take its answers for the Hub's is shown by test_hub.py and data/test_streaming.py.
"""

import http.client
import json

import pytest
from hub_server import CARD_KEYS, HubServer, sha256


RESULT = {
    "task": {"type": "image-to-text"},
    "dataset": {"type": "tester/set", "name": "Set"},
    "metrics": [{"type": "rouge", "value": 0.15}],
}


@pytest.fixture
def hub():
    with HubServer(token="hf_test", user="tester") as server:
        yield server


def raw(hub, method: str, path: str, body: bytes | dict = b"", token: str | None = "hf_test", **headers):
    """Send one request without a client; return the status, the headers and the body."""
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers)
    response = connection.getresponse()
    answer = response.status, response.headers, response.read()
    connection.close()
    return answer


def test_writes_need_the_token_and_the_namespace_of_the_user(hub):
    hub.add_repository("other/model", {"config.json": b"{}"})
    new = {"name": "model", "organization": "tester"}
    for status, path, body, token in (
        (401, "/api/repos/create", new, "hf_wrong"),
        (401, "/api/repos/create", new, None),
        (403, "/api/repos/create", new | {"organization": "other"}, "hf_test"),
        (403, "/api/models/other/model/preupload/main", {"files": []}, "hf_test"),
        (200, "/api/repos/create", new, "hf_test"),
        (409, "/api/repos/create", new, "hf_test"),
    ):
        assert raw(hub, "POST", path, body, token)[0] == status
    assert hub.problems == ["Wrong token at create", "Missing token at create"]
    assert [raw(hub, "GET", "/api/models/tester/none", token=token)[0] for token in ("hf_test", None)] == [404, 401]


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
    starts = (
        *[f"Upload of {oid}"] * 3, "Commit of a.bin, whose LFS object", "Commit of a.bin as a regular file",
        "README.md of a commit: there is no YAML block", "Unknown request: GET /api/spaces/tester/none",
        "The token was sent to the storage",
    )  # fmt: skip
    assert all(problem.startswith(start) for problem, start in zip(hub.problems, starts, strict=True))
    assert len(hub.commits("tester/model")) == 1
    assert commit("lfsFile", path="a.bin", oid=oid, size=5) == 200
    assert hub.files("tester/model") == {"config.json": b"{}", "a.bin": b"whole"}
    assert {b"whole", b"none"} <= set(hub.received)


def card(**changes) -> str:
    """JSON is YAML, too."""
    return f"---\n{json.dumps(dict.fromkeys(CARD_KEYS, 'x') | {'model-index': index()} | changes)}\n---\n# A model\n"


def index(**changes) -> list[dict]:
    return [{"name": "model", "results": [RESULT | changes]}]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("# No block\n", "there is no YAML block"),
        ("---\n- a list\n---\n", "there is no YAML block"),
        ("---\nlicense: !!python/object/apply:numpy.float64 [1]\n---\n", "there is no YAML block"),
        (card(license=None), '"license" is required'),
        (card(base_model="outputs/my run"), '"base_model" is not a model id'),
        (card(**{"model-index": index(dataset={"type": "set"})}), "\"model-index\" cannot be read: KeyError('name')"),
        (card(**{"model-index": index(task={"type": None})}), '"task_type" of a result'),
        (card(**{"model-index": index(metrics=[{"type": "rouge", "value": "0.1"}])}), '"value" of a metric'),
    ],
)
def test_a_card_without_readable_scores_is_refused(hub, content, error):
    assert raw(hub, "POST", "/api/validate-yaml", {"content": card(base_model="Salesforce/tiny")}, None)[0] == 200
    status, _, body = raw(hub, "POST", "/api/validate-yaml", {"content": content}, None)
    (found,) = json.loads(body)["errors"]
    assert status == 400 and found["message"].startswith(error)
