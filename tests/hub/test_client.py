"""A silent Hub neither hangs a run nor keeps the user guessing; a slow one is waited for."""

import os
import subprocess
import sys
import time

import httpx2
import pytest
from processes import ROOT

from captioning.hub import client


SHORT = "from captioning.hub import client; client.TIMEOUT, client.NOTICE = 1.5, 0.5; "
MAIN = "from captioning.command_line import exit_on_user_error as run; import run_captioning; "


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["--model_name_or_path", "some/start", "--dataset_name", "DATA"], "GET {}/api/models/some/start/"),
        (["--model_name_or_path", "some/start", "--dataset_name", "some/data"], "GET {}/api/datasets/some/data"),
        (["--model_name_or_path", "a/b", "--dataset_name", "a/b", "--streaming"], "GET {}/api/datasets/a/b"),
        (["--config_name", "some/config", "--dataset_name", "DATA"], "GET {}/api/models/some/config"),
        (["hf://some/model/recipe.json"], "HEAD {}/some/model/resolve/main/recipe.json"),
    ],
)
def test_a_start_ends_when_the_hub_is_silent_and_says_what_it_waits_for(
    hub, served, tmp_path, parquet_folder, arguments, asked
):
    hub.fail("any", "silent")
    given = [str(parquet_folder) if value == "DATA" else value for value in arguments]
    given += [] if given[0].startswith("hf://") else ["--output_dir", str(tmp_path)]
    call = f"run(lambda: run_captioning.main({given}))"
    errors = served[2].run(["-c", SHORT + MAIN + call], code=2, timeout=60).stderr
    assert f"waiting for the Hub: {asked.format(hub.url)}" in errors
    assert errors.splitlines()[-1].startswith("error: ")
    assert "the Hub has been silent for 1.5 s" in errors
    assert "Traceback" not in errors


def test_one_silence_is_not_waited_for_again_by_each_of_many_calls(hub, served):
    hub.fail("any", "silent")
    calls = """
import time
client.limit_waiting()
from huggingface_hub import HfApi, hf_hub_download
from captioning.hub.faults import describe_fault
start = time.monotonic()
for call in (HfApi().model_info, HfApi().dataset_info, HfApi().create_repo, lambda name: hf_hub_download(name, "x")):
    try:
        call("a/b")
    except Exception as error:
        print(describe_fault(error))
assert 1.5 < time.monotonic() - start < 2.5, time.monotonic() - start
"""
    lines = served[2].run(["-c", SHORT + calls]).stdout.splitlines()
    assert len(lines) == 4 and all("the Hub has been silent for 1.5 s" in line for line in lines)


def test_without_a_network_a_wrong_name_is_said_at_once(tmp_path):
    """The client alone tries each of several files six times, for 24 s each."""
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    code = """
import time
from captioning.hub import client
from captioning.inference.model import InferenceModel
client.limit_waiting()
for name in ("user/name", "./name", "/some/name", "a/b/c"):
    start = time.monotonic()
    try:
        InferenceModel(name, device="cpu")
    except ValueError as error:
        print(error)
    assert time.monotonic() - start < 10
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True)
    reached, *others = ended.stdout.splitlines()
    assert reached.startswith("model 'user/name' cannot be loaded: the Hub cannot be reached (")
    assert len(others) == 3 and all("there is no such folder, and a name on the Hub is user/name" in x for x in others)
    assert ended.stderr.count("\n") == 1, "that the commit cannot be checked"


def test_a_download_that_makes_progress_may_take_longer_than_the_limit(hub, served):
    hub.add_repository("some/model", {"large.bin": bytes(100_000)})
    hub.fail("resolve", "slow")
    code = SHORT + "client.limit_waiting(); from huggingface_hub import hf_hub_download as get; import os; "
    result = served[2].run(["-c", code + "print(os.path.getsize(get('some/model', 'large.bin')))"])
    assert result.stdout == "100000\n"
    assert "waiting" not in result.stderr


REQUEST = httpx2.Request("GET", "http://host/")


@pytest.fixture
def transport(monkeypatch):
    """Return a function that makes a transport whose host answers by a function, and was not heard before."""
    monkeypatch.setattr(client, "_heard", {})
    monkeypatch.setattr(client, "_silent", {})
    return lambda answer: client._PatientTransport(httpx2.MockTransport(answer))


def test_an_old_silence_is_forgotten(monkeypatch, transport):
    transport = transport(lambda _: httpx2.Response(200))
    monkeypatch.setitem(client._silent, "host", time.monotonic())
    with pytest.raises(client.SilentHub):
        transport.handle_request(REQUEST)
    monkeypatch.setattr(client, "FORGOTTEN", 0.0)
    assert transport.handle_request(REQUEST).status_code == 200


def test_a_byte_ends_the_silence_of_its_host(monkeypatch, transport):
    chunks = iter([b"1", b"2"])
    response = transport(lambda _: httpx2.Response(200, content=chunks)).handle_request(REQUEST)
    parts = iter(response.stream)
    next(parts)
    client._silent["host"] = client._silent["other"] = time.monotonic()
    next(parts)
    assert client._silent.keys() == {"other"}


@pytest.mark.parametrize(
    ("error", "answers_others", "is_silent"),
    [
        (httpx2.ReadTimeout, False, True),
        (httpx2.ConnectTimeout, False, True),
        (httpx2.ReadTimeout, True, False),
        (httpx2.PoolTimeout, False, False),
        (httpx2.WriteTimeout, False, False),
    ],
)
def test_a_host_is_silent_if_it_answers_on_no_connection(transport, error, answers_others, is_silent):
    def time_out(request):
        if answers_others:
            transport(lambda _: httpx2.Response(200)).handle_request(REQUEST)
        raise error("timed out")

    with pytest.raises(client.SilentHub):
        transport(time_out).handle_request(REQUEST)
    assert ("host" in client._silent) == is_silent
