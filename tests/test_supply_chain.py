"""What is installed and run is pinned: packages by hash, actions by commit."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parent.parent
LOCKED = re.compile(r"^([a-z0-9._-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))


def pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [re.fullmatch(r"([\w.-]+)==([\w.+]+)", line) for line in lines if line and not line.startswith("-r ")]
    return {normal(pin[1]): pin[2] for pin in found}


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
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"]
        for step in job["steps"]:
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False
            assert set(re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))) <= targets
            assert all((ROOT / file).is_file() for file in re.findall(r"-r (\S+)", step.get("run", "")))
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", use) for use in uses), uses


def test_each_push_is_tested_each_week_audited_and_updates_are_watched():
    runs = {path.stem: path.read_text() for path in WORKFLOWS}
    assert all(f"run: make {target}" in runs["ci"] for target in ("lint", "test-all"))
    assert "run: make audit" in runs["audit"]
    # Runs of one workflow on one branch cancel each other: the audit would cancel the tests of a push
    assert "schedule:" in runs["audit"] and "schedule:" not in runs["ci"]
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "github-actions"}


def test_the_version_of_pytorch_is_the_same_everywhere():
    wanted = pins("requirements.txt")["torch"]
    for path in ("requirements.lock", ".github/workflows/ci.yml"):
        assert set(re.findall(r"torch==([\d.]+)", (ROOT / path).read_text())) == {wanted}


SKIPPED = "torch Dependency not found on PyPI and could not be audited: torch (2.13.0)"
VULNERABLE = "pillow 13.0.0 PYSEC-0 13.0.1"


@pytest.mark.parametrize(
    ("output", "status", "fails", "shown"),
    [
        ("No known vulnerabilities found", 0, False, "No known vulnerabilities"),
        (VULNERABLE, 1, True, VULNERABLE),
        (f"No known vulnerabilities found\n{SKIPPED}", 0, True, "1 of "),
        (f"{VULNERABLE}\n{SKIPPED}", 1, True, VULNERABLE),
        ("Traceback (most recent call last):\nConnectionError: x", 1, True, "cannot be reached: ConnectionError"),
    ],
)
def test_an_audit_without_an_answer_is_not_a_clean_audit(tmp_path, output, status, fails, shown):
    (tmp_path / "output").write_text(f"{output}\n")
    auditor = tmp_path / "pip-audit"
    auditor.write_text(f"#!/bin/sh\ncat '{tmp_path}/output'\nexit {status}\n")
    auditor.chmod(0o755)
    run = subprocess.run([ROOT / ".ci" / "audit", auditor], capture_output=True, text=True)
    assert (run.returncode != 0) == fails
    assert shown in run.stdout + run.stderr
    if SKIPPED in output:
        assert "No known vulnerabilities" not in run.stdout
