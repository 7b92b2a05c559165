"""Links, files, commands and flags that the documents name exist."""

import contextlib
import functools
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from captioning.__main__ import main
from captioning.training.arguments import CaptioningArguments, DataArguments, ModelArguments, PushArguments
from captioning.training.recipe import RecipeParser


ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "recipes/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
CURRENT = [name for name in DOCUMENTS if name != "CHANGELOG.md"]  # it names what is gone, too
OURS = [path for pattern in ("*.py", "[bct]*/**/*.py") for path in ROOT.glob(pattern)]
FLAG = r"--[a-z]\w+"
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUN = RecipeParser((ModelArguments, DataArguments, CaptioningArguments), allow_abbrev=False)
PUSH = RecipeParser(PushArguments, allow_abbrev=False)
FOREIGN = {"--signal"}  # of sbatch


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each of our commands, from its script on, in blocks and between backticks."""
    text = re.sub(r"\\\n\s*", "", text)
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    lines += re.findall(r"^ {4}(.+)$", text, re.MULTILINE)
    for line in lines + re.findall(r"`([^`]+)`", BLOCK.sub("", text)):
        command = re.split(r"\s#\s|\s[|&;]+\s", " ".join(line.split()))[0]
        if found := re.search(r"\brun_captioning\.py\s.+|-m captioning\s.+|\bbenchmarks/\w+\.py\b.*", command):
            words = re.sub(r"<[^<>]*>", "x", re.sub(r"[][]|\.\.\.|^-m |--flag value", "", found[0]))
            yield shlex.split(words)


@functools.cache
def source_of_tests() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in OURS if path.name.startswith("test_"))


@functools.cache
def flags_of_command(name: str) -> set[str]:
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        main([name, "--help"])
    return set(re.findall(FLAG, shown.getvalue()))


def flags_of_benchmark(path: str) -> set[str]:
    return set(re.findall(f'"({FLAG})"', read(path) + read("benchmarks/measure.py")))


def unknown_flags(program: str, words: list[str]) -> list[str]:
    flags = {word.split("=")[0] for word in words if word.startswith("--")} - {"--help"}
    if program == "captioning":
        return sorted(flags - flags_of_command(words[0])) if words[0] != "--help" else []
    if program != "run_captioning.py":
        return sorted(flags - flags_of_benchmark(program))
    arguments = words[1:] if words and not words[0].startswith("-") else words  # the first may be a recipe
    return (PUSH if "--push_only" in words else RUN).parse_known_args(
        [w for w in arguments if w not in ("--help", "&")]
    )[1]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_a_file_and_a_heading(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if re.match("https?:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / document).parent / file if file else ROOT / document
        assert path.exists(), f"{target} does not exist"
        if anchor:
            text = path.read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
            anchors = {re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors | set(re.findall(r'<a (?:id|name)="(.+?)"', text)), f"{target} is no heading"


@pytest.mark.parametrize("document", CURRENT)
def test_files_and_tests_that_a_document_names_exist(document):
    text = read(document)
    for name in re.findall(r"`((?:captioning|tests|recipes|benchmarks|docs|\.ci)/[^\s`<>:]*)", text):
        assert list(ROOT.glob(name.rstrip("/"))), f"{name} does not exist"
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert any(path.match(name) for path in OURS), f"{name} does not exist"
    for name in re.findall(r"(?:`|::)(test_\w+)\b(?!\.py)", text):
        assert f"def {name}(" in source_of_tests(), f"{name} does not exist"


def test_each_promise_of_the_same_loss_for_a_divided_batch_is_limited_to_dropout_0():
    promise = re.compile(r"(same|equal|stay|depend)[^.]*loss|loss[^.]*\b(same|equal)\b|as one process|global batch \|")
    found = {}
    for document in ("README.md", "recipes/README.md", *(name for name in CURRENT if name.startswith("docs/"))):
        paragraphs = re.split(r"\n\s*\n|\n(?=[|*])", read(document))
        divided = [text for text in paragraphs if re.search("accumulation|process|global batch", text)]
        found |= {text: "dropout" in text for text in divided if promise.search(text)}
    assert len(found) >= 6 and all(found.values()), [text for text, limited in found.items() if not limited]
    for config in (ROOT / "recipes" / "configs").glob("*.json"):
        assert "dropout" not in config.read_text(), "it is 0 unless a config says otherwise"


@pytest.mark.parametrize("document", CURRENT)
def test_commands_that_a_document_shows_are_known_with_their_flags(document):
    text = read(document)
    for program, *words in commands(text):
        unknown = unknown_flags(program, words)
        assert not unknown, f"{program} has no {unknown}: {words}"
    for recipe in re.findall(r"\b(recipes/\w+\.json)", text):
        assert (ROOT / recipe).is_file(), f"{recipe} does not exist"
    for script in re.findall(r"python (\w+\.py)", text):
        assert "__main__" in read(script), f"{script} is not a script"
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets


@pytest.mark.parametrize("document", CURRENT)
def test_flags_between_backticks_are_known(document):
    known = set(RUN._option_string_actions) | set(PUSH._option_string_actions) | FOREIGN
    known = known.union(*map(flags_of_command, ("prepare", "score", "check", "caption", "demo")))
    known = known.union(*(flags_of_benchmark(str(path)) for path in ROOT.glob("benchmarks/*.py")))
    assert set(re.findall(f"`({FLAG})", read(document))) <= known
