"""The metrics of COCO captions, with the values of `pycocoevalcap` 1.2 (Chen et al., 2015, arXiv:1504.00325).

The library's Java programs tokenize and compute METEOR. The rest is written here: as functions of sums over captions,
so that scores can be resampled, in a tenth of the library's time. What cannot be computed is named, with one line that
says what is missing and how to get it. Nothing is downloaded, and nothing that the library prints reaches the user.
"""

import importlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from captioning.errors import UserError
from captioning.scoring import TOKENIZERS
from captioning.scoring.bootstrap import Score
from captioning.scoring.ngrams import ngram_scores


METEOR_CAPTIONS = 20_000  # METEOR takes 0.7 ms a caption, more than all else

# A process lives for seconds: the second compiler of the JVM costs more than it gains
JVM_OPTIONS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
INSTALL_JAVA = "install a Java runtime, e.g. `apt install default-jre-headless`"
WRONG_ANSWER = f"`java` runs, but its answer is not that of the program: {INSTALL_JAVA}"

# METEOR 1.5 for English: Denkowski and Lavie (2014), aclanthology.org/W14-3348; the jar's defaults
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MODULE_WEIGHTS = (1.0, 0.6, 0.8, 0.6)  # of exact, stem, synonym and paraphrase matches
SEGMENT_STATISTICS = 23  # numbers in the jar's answer to one `SCORE` line


def coco_scores(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    tokenizer: str = "ptb",
    constant: str | None = None,
) -> tuple[dict[str, dict[str, Score]], dict[str, str], list[str] | None]:
    """Score the N captions of each system as `COCOEvalCap` or, by white space, as `nlg-eval` does.

    Two systems get METEOR, or as many as have no more than `METEOR_CAPTIONS` in all; the `constant` is one of them, a
    caption whose METEOR, given for every image, is returned as that of a system "constant".

    Returns:
        By system, `bleu1` to `bleu4`, `cider` (from 0 to 10), `rougeL` and `meteor`, behind the prefix of the
        tokenizer; by score what is missing for it; the tokens of the references, None where they are missing.

    Raises:
        ValueError: a system does not have N captions.
    """
    prefix = TOKENIZERS[tokenizer]
    try:
        reference_tokens = coco_tokens(references, tokenizer)
        tokens = {name: coco_tokens(captions, tokenizer) for name, captions in systems.items()}
    except UserError as error:
        return {}, {f"{prefix}_*": str(error)}, None
    scores, missing = ngram_scores(tokens, reference_tokens), {}
    try:
        most, has_constant = METEOR_CAPTIONS // len(references), constant is not None
        slow = dict(list(tokens.items())[: max(2, most) - has_constant])
        if has_constant:
            slow["constant"] = coco_tokens([constant], tokenizer) * len(references)
        for name, found in meteor_scores(slow, reference_tokens).items():
            scores.setdefault(name, {})["meteor"] = found
    except UserError as error:
        missing[f"{prefix}_meteor"] = str(error)
    named = {name: {f"{prefix}_{key}": score for key, score in own.items()} for name, own in scores.items()}
    return named, missing, reference_tokens


def coco_tokens(captions: Sequence[str], tokenizer: str = "ptb") -> list[str]:
    """Return the tokens of each caption, joined by a space, as the scorers of `pycocoevalcap` take them.

    "ptb" is Stanford's PTBTokenizer, lower-case and without punctuation, as in `COCOEvalCap`; it keeps brackets as
    `-lrb-` and `-rrb-`, because the library's list has them in upper case only. "whitespace" only strips the text, as
    `nlg-eval` does; "whitespace_lower" makes it lower-case too, as many reports do before.

    All captions go through one Java process. The lists of two systems are not joined: the tokenizer reads an
    abbreviation at the end of a caption ("No.") together with the start of the next one.

    Raises:
        UserError: with "ptb", `pycocoevalcap` or Java is not installed.
    """
    # The tokenizer works by line, and the library removes only line feeds: a carriage return would shift all captions
    lines = [" ".join(caption.splitlines()) for caption in captions]
    if tokenizer != "ptb":
        return [line.strip().lower() if tokenizer == "whitespace_lower" else line.strip() for line in lines]
    ptbtokenizer = _pycocoevalcap("tokenizer.ptbtokenizer")
    # From standard input: the library writes a file into its own package folder, which can be read-only
    options = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    output = _java(ptbtokenizer, ["-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, *options], lines)
    if len(output) != len(lines):
        raise UserError(WRONG_ANSWER)
    removed = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in removed) for line in output]


def meteor_scores(systems: Mapping[str, Sequence[str]], references: Sequence[str]) -> dict[str, Score]:
    """Return the METEOR of each system, as `Meteor()` gives it, from one start of its jar, which takes seconds.

    The N captions of each system and the N references are from `coco_tokens`.

    Raises:
        UserError: `pycocoevalcap` or Java is not installed.
    """
    pairs = [pair for captions in systems.values() for pair in zip(captions, references, strict=True)]
    row = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}  # each pair once
    statistics = np.split(_meteor_statistics(list(row))[[row[pair] for pair in pairs]], len(systems))
    return {name: Score(own, _meteor) for name, own in zip(systems, statistics, strict=True)}


def _meteor_statistics(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Return what each pair of prediction and reference adds to METEOR's sums, float `[N, 6]`.

    They are the weighted matches in the prediction and in the reference, the weighted lengths of both, the chunks, and
    the matched words (the mean of both sides). The jar answers a `SCORE` line with the lengths and the function words
    of both, for each module the matched content and function words of both, the chunks, and the matched words of both.
    """
    # "|||" separates the fields. The library removes it from predictions only: a reference with it would become two
    texts = [[text.replace("|||", "") for text in pair] for pair in pairs]
    lines = [f"SCORE ||| {reference} ||| {prediction}" for prediction, reference in texts]
    meteor = _pycocoevalcap("meteor.meteor")
    options = ["-jar", "-Xmx2G", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
    rows = [line.split() for line in _java(meteor, options, lines)[:-1]]
    if [len(row) for row in rows] != [SEGMENT_STATISTICS] * len(pairs):
        raise UserError(WRONG_ANSWER)
    table = np.array(rows, float)
    lengths, function_words = table[:, 0:2], table[:, 2:4]
    matches = table[:, 4:20].reshape(-1, 4, 2, 2)  # of each module content, then function words; of both sides
    chunks, word_matches = table[:, 20], table[:, 21:23]
    content_or_function = np.array([DELTA, 1 - DELTA])
    weighted_matches = np.einsum("nmws,m,w->ns", matches, MODULE_WEIGHTS, content_or_function)
    weighted_lengths = DELTA * (lengths - function_words) + (1 - DELTA) * function_words
    # A caption that matches its reference from end to end has no fragments (`MeteorStats.addStats`)
    whole = (matches.sum(axis=(1, 2)) == lengths).all(axis=1) & (chunks == 1)
    chunks = np.where(whole, 0, chunks)
    return np.column_stack([weighted_matches, weighted_lengths, chunks, word_matches.mean(axis=1)])


def _meteor(sums: np.ndarray, number: int) -> np.ndarray:
    """Return METEOR 1.5 `[...]` of sums `[..., 6]`: `computeMetrics` in the jar, whose 17 digits agree to 1e-12."""
    test_matches, reference_matches, test_length, reference_length, chunks, words = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # no match at all: 0, as in the jar
        precision, recall = test_matches / test_length, reference_matches / reference_length
        f_mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        return np.nan_to_num(f_mean * (1 - GAMMA * (chunks / words) ** BETA), nan=0.0).clip(min=0)


def _pycocoevalcap(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise UserError("pycocoevalcap is not installed: `pip install pycocoevalcap`") from error


def _java(library: ModuleType, options: list[str], lines: list[str]) -> list[str]:
    """Run a jar that lies beside the module `library`, and return the lines that it answers."""
    text = "\n".join(lines).encode("utf-8", errors="replace")  # JSON can hold an unpaired surrogate
    try:
        run = subprocess.run(
            ["java", *JVM_OPTIONS, *options], input=text, capture_output=True, cwd=Path(library.__file__).parent
        )
    except OSError as error:
        raise UserError(f"`java` cannot be run ({error.strerror}): {INSTALL_JAVA}") from error
    if run.returncode:
        reason = " ".join(run.stderr.decode(errors="replace").split())[:200]
        raise UserError(f"`java` failed with status {run.returncode} ({reason}): {INSTALL_JAVA}")
    return run.stdout.decode("utf-8").split("\n")
