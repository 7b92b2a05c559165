"""Files that may lie beside a model on the Hub: there, absent, or, without an answer, not to be known."""

import pytest


CODE = """
import logging
logging.basicConfig(format="%(message)s")
from captioning.hub.client import limit_waiting
from captioning.models.optional_file import optional_file
limit_waiting()
"""
LOOK = "print(*[bool(optional_file('some/model', name, {!r})) for name in ('there.json', 'absent.json')])"
WARNING = "model 'some/model': the Hub does not answer; if it has a absent.json, that is not used"


@pytest.fixture
def look(hub, home, served):
    """Run a look for two files after other code; return its output and its warnings."""
    commit = hub.add_repository("some/model", {"config.json": b"{}", "there.json": b"{}"})

    def run(code: str = "", variables: str = "") -> tuple[str, str]:
        result = served[2].run(["-c", variables + CODE + code + LOOK.format(commit)])
        return result.stdout.strip(), result.stderr.strip()

    run.download = f"import huggingface_hub; huggingface_hub.snapshot_download('some/model', revision='{commit}')"
    return run


def test_a_file_is_there_or_absent_and_what_an_earlier_look_has_found_needs_no_connection(look, hub):
    assert look("optional_file('some/model', 'config.json'); ") == ("True False", "")
    hub.fail("any", 503)
    assert look() == ("True False", "")


@pytest.mark.parametrize("offline", [False, True])
def test_without_an_answer_the_user_of_a_cached_model_is_warned_unless_offline_by_will(look, hub, served, offline):
    served[2].run(["-c", look.download])
    hub.fail("any", 503)
    code = "from huggingface_hub import constants; constants.HF_HUB_OFFLINE = True; " if offline else ""
    assert look(variables=code) == ("True False", "" if offline else WARNING)


def test_without_an_answer_a_model_that_is_not_there_is_left_to_its_loader(look, hub):
    hub.fail("any", 503)
    assert look() == ("False False", "")
