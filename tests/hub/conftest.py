"""A Hub on the loopback, and a Python whose Hub client was started with it: the client reads its settings once."""

import shutil

import pytest
from hub_server import HubServer
from processes import Server


NO_WAITS = "from huggingface_hub.utils import http_backoff; http_backoff.__kwdefaults__['base_wait_time'] = 0.01"


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The Hub, a home folder, and the Python."""
    home = tmp_path_factory.mktemp("hub") / "home-of-sentinel"  # which every absolute path of these tests contains
    with HubServer(token="hf_SentinelOfASecretToken", user="tester") as hub:
        python = Server(hub.environment(home) | {"HOME": str(home)}, NO_WAITS)
        yield hub, home, python
        python.close()


@pytest.fixture
def hub(served):
    served[0].reset()
    return served[0]


@pytest.fixture
def home(served):
    _, folder, _ = served
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
