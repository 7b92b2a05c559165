"""What is installed and run is pinned: packages by hash, actions by commit."""

import re
from pathlib import Path

import pytest
import yaml

import run_captioning


ROOT = Path(run_captioning.__file__).parent
LOCKED = re.compile(r"^([a-z0-9._-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("-r ")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines), lines
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_requirements_are_pinned_and_locked_at_the_same_versions():
    text = (ROOT / "requirements.lock").read_text()
    locked = {normal(name): version for name, version, _ in LOCKED.findall(text)}
    entries = [line for line in text.splitlines() if line and line[0] not in "# "]
    assert len(entries) == len(locked), "an entry has no hash"
    wanted = pins("requirements.txt")
    del wanted["torch"]  # see the head of the lock
    assert {name: locked.get(name) for name in wanted} == wanted, "run `make lock`"
    assert pins("requirements-dev.txt")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_pinned_and_may_only_read(path):
    workflow = yaml.safe_load(path.read_text())
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"]
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False
            assert set(re.findall(r"\bmake ([a-z]+)", step.get("run", ""))) <= targets
    assert re.findall(r"uses: \S+@\S+  # v\d", path.read_text())


def test_dependabot_watches_packages_and_actions():
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "github-actions"}


def test_the_version_of_pytorch_is_the_same_everywhere():
    wanted = pins("requirements.txt")["torch"]
    for path in ("requirements.lock", ".github/workflows/ci.yml"):
        assert set(re.findall(r"torch==([\d.]+)", (ROOT / path).read_text())) == {wanted}
