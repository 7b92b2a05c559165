"""BLEU, CIDEr, ROUGE-L and METEOR, with the values of `pycocoevalcap` 1.2 (Chen et al., 2015, arXiv:1504.00325).

The library's Java programs tokenize and compute METEOR. The rest is written here: as functions of sums over captions,
so that scores can be resampled, and of the n-grams of all systems counted at once, in a tenth of its time. What cannot
be computed is named, with one line that says what is missing and how to get it.
Nothing is downloaded, and nothing that the library prints reaches the user.
"""

import atexit
import contextlib
import functools
import importlib
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import scipy.sparse as sp

from captioning.errors import UserError
from captioning.scoring import TOKENIZERS
from captioning.scoring.bootstrap import Score
from captioning.scoring.ngrams import NgramTable
from metrics import lcs_length


METEOR_CAPTIONS = 20_000  # METEOR takes 0.7 ms a caption, more than all else

# A process lives for seconds: the second compiler of the JVM costs more than it gains
JVM_OPTIONS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
INSTALL_JAVA = "install a Java runtime, e.g. `apt install default-jre-headless`"
WRONG_ANSWER = f"`java` runs, but its answer is not that of the program: {INSTALL_JAVA}"

CIDER_SIGMA, CIDER_SCALE = 6.0, 10.0  # `pycocoevalcap.cider.cider_scorer`
ROUGE_BETA = 1.2  # `pycocoevalcap.rouge.rouge.Rouge`; rouge_score weighs precision and recall alike
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
    """Score several systems on the same N images as `COCOEvalCap` or, by white space, as `nlg-eval` does.

    Args:
        systems: the N captions of each. Two of them, the constant included, get METEOR, or as many as have no more
            than `METEOR_CAPTIONS` in all.
        references: N captions, from which CIDEr takes its document frequencies.
        tokenizer: one of `TOKENIZERS`, see `coco_tokens`.
        constant: a caption whose METEOR, given for every image, is returned as that of a system "constant".

    Returns:
        By system, the scores `coco_bleu1` to `coco_bleu4`, `coco_cider` (from 0 to 10), `coco_rougeL` and
        `coco_meteor`, or with another tokenizer the same names with its prefix; by score what is missing for it; and
        the tokens of the references, None where they are missing.

    Raises:
        ValueError: a system does not have N captions.
    """
    prefix = TOKENIZERS[tokenizer]
    try:
        reference_tokens = coco_tokens(references, tokenizer)
        tokens = {name: coco_tokens(captions, tokenizer) for name, captions in systems.items()}
    except UserError as error:
        return {name: {} for name in systems}, {f"{prefix}_*": str(error)}, None
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


# --- Tokens ---------------------------------------------------------------------------------------------------


def coco_tokens(captions: Sequence[str], tokenizer: str = "ptb") -> list[str]:
    """Return the tokens of each caption, joined by a space, as the scorers of `pycocoevalcap` take them.

    All captions go through one Java process, as `COCOEvalCap` sends them. The lists of two systems are not joined: the
    tokenizer reads an abbreviation at the end of a caption ("No.") together with the start of the next one.

    Args:
        captions: N captions. Each is made one line first: the tokenizer works by line, and the library itself removes
            only line feeds, so that a carriage return would shift all captions after it.
        tokenizer: "ptb" for Stanford's PTBTokenizer, lower-case and without punctuation, as `COCOEvalCap` does; it
            keeps brackets as `-lrb-` and `-rrb-`, because the library's list has them in upper case only.
            "whitespace" strips the text and leaves the rest as it is, as `nlg-eval` does; "whitespace_lower" makes it
            lower-case too, as reports do whose captions were lower-cased before.

    Raises:
        UserError: with "ptb", `pycocoevalcap` or Java is not installed.
    """
    lines = [one_line(caption) for caption in captions]
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


def one_line(caption: str) -> str:
    r"""Return the caption with a space for each line break that `str.splitlines` knows (`\r`, U+2028, ...)."""
    return " ".join(caption.splitlines())


# --- BLEU, CIDEr, ROUGE-L -------------------------------------------------------------------------------------


def ngram_scores(systems: Mapping[str, Sequence[str]], references: Sequence[str]) -> dict[str, dict[str, Score]]:
    """Return `bleu1` to `bleu4`, `cider` and `rougeL` of each system, as `Bleu(4)`, `Cider()` and `Rouge()` give them.

    CIDEr is 0 for a single image: its inverse document frequencies are log(1 / 1).

    Args:
        systems: the N captions of each, from `coco_tokens`.
        references: N captions, from `coco_tokens`.

    Raises:
        ValueError: a system does not have N captions.
    """
    if any(len(captions) != len(references) for captions in systems.values()):
        raise ValueError(f"there are {len(references)} references, and another number of captions of a system")
    row = {text: i for i, text in enumerate(dict.fromkeys(itertools.chain(references, *systems.values())))}
    table = NgramTable([text.split() for text in row])
    rows = {name: [row[text] for text in captions] for name, captions in systems.items()}
    of_reference = [row[text] for text in references]
    lengths, reference_lengths = table.lengths, table.lengths[of_reference]
    num_pairs = np.maximum(lengths - 1, 0)  # CIDEr's length of a caption is its number of 2-grams
    counted = {name: np.zeros((len(references), 8)) for name in systems}
    cider = {name: np.zeros(len(references)) for name in systems}
    for n in range(1, 5):
        counts = table.counts(n)
        reference = counts[of_reference]
        idf = inverse_document_frequencies(reference)
        weights = reference @ idf
        for name, own_rows in rows.items():
            own = counts[own_rows]
            counted[name][:, n - 1] = own.sum(axis=1).A1
            counted[name][:, n + 3] = own.minimum(reference).sum(axis=1).A1
            penalty = cider_penalty(num_pairs[own_rows] - num_pairs[of_reference])
            cider[name] += _cosines(own @ idf, weights) * penalty * (CIDER_SCALE / 4)
    scores = {}
    for name, own_rows in rows.items():
        sums = np.column_stack([counted[name], lengths[own_rows], reference_lengths])
        scores[name] = {f"bleu{n}": Score(sums, functools.partial(bleu, n)) for n in range(1, 5)}
        rouge_l = _rouge_l(systems[name], references)
        scores[name] |= {"cider": Score.of(cider[name]), "rougeL": Score.of(rouge_l)}
    return scores


def inverse_document_frequencies(counts: sp.csr_matrix) -> sp.dia_matrix:
    """Return CIDEr's weight of each n-gram, a diagonal matrix, from the counts `[N, G]` of N references."""
    number = np.bincount(counts.indices, minlength=counts.shape[1])
    return sp.diags(np.log(counts.shape[0]) - np.log(np.maximum(number, 1)))


def cider_penalty(difference: np.ndarray) -> np.ndarray:
    """Return CIDEr-D's factor for two captions whose lengths, in 2-grams, differ by so much."""
    return np.exp(-(difference**2) / (2 * CIDER_SIGMA**2))


def norms(weights: sp.csr_matrix) -> np.ndarray:
    """Return the Euclidean length of each row, `[N]`."""
    return np.sqrt(weights.multiply(weights).sum(axis=1).A1)


def _cosines(own: sp.csr_matrix, reference: sp.csr_matrix) -> np.ndarray:
    """Return CIDEr-D's similarity of each row of both, `[N]`: a cosine in which repeated n-grams are clipped."""
    common = own.minimum(reference).multiply(reference).sum(axis=1).A1
    total = norms(own) * norms(reference)
    return np.divide(common, total, out=np.zeros_like(total), where=total > 0)


def bleu(n: int, sums: np.ndarray, number: int) -> np.ndarray:
    """Return BLEU-n `[...]` by `BleuScorer.compute_score`'s formula.

    Args:
        n: the longest n-grams that count.
        sums: `[..., 10]` over captions: possible and matched 1- to 4-grams, words, words of the reference.
        number: of captions; unused, because BLEU is not a mean over captions.
    """
    small, tiny = 1e-9, 1e-15  # the scorer's constants against a division by zero
    guess, correct, (length, reference_length) = sums[..., :n], sums[..., 4 : 4 + n], np.moveaxis(sums[..., 8:], -1, 0)
    precision = np.prod((correct + tiny) / (guess + small), axis=-1) ** (1 / n)
    ratio = (length + tiny) / (reference_length + small)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


def _rouge_l(captions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return the ROUGE-L of each caption, `[N]`, from 0 to 1: `Rouge.calc_score` with a faster common subsequence.

    As there, a token is what lies between two single spaces.
    """
    pairs = [(a.split(" "), b.split(" ")) for a, b in zip(captions, references, strict=True)]
    common, own, stated = np.array([(lcs_length(a, b), len(a), len(b)) for a, b in pairs], float).T
    precision, recall = common / own, common / stated
    weighted = recall + ROUGE_BETA**2 * precision
    scaled = (1 + ROUGE_BETA**2) * precision * recall
    return np.divide(scaled, weighted, out=np.zeros(len(pairs)), where=common > 0)


# --- METEOR ---------------------------------------------------------------------------------------------------


def meteor_scores(systems: Mapping[str, Sequence[str]], references: Sequence[str]) -> dict[str, Score]:
    """Return the METEOR of each system, as `Meteor()` gives it, by one program for all calls: `start_meteor`.

    Args:
        systems: the N captions of each, from `coco_tokens`.
        references: N captions, from `coco_tokens`.

    Raises:
        UserError: `pycocoevalcap` or Java is not installed.
    """
    pairs = [pair for captions in systems.values() for pair in zip(captions, references, strict=True)]
    row = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}  # each pair once
    statistics = np.split(_meteor_statistics(list(row))[[row[pair] for pair in pairs]], len(systems))
    return {name: Score(own, _meteor) for name, own in zip(systems, statistics, strict=True)}


def _meteor_statistics(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Return float `[N, 6]`, what each caption adds to METEOR's sums.

    They are the weighted matches in the prediction and in the reference, the weighted lengths of both, the chunks, and
    the matched words (the mean of both sides). The jar answers a `SCORE` line with the lengths and the function words
    of both, for each module the matched content and function words of both, the chunks, and the matched words of both.

    Args:
        pairs: prediction and reference of N captions.
    """
    # "|||" separates the fields. The library removes it from predictions only: a reference with it would become two
    texts = [[one_line(text).replace("|||", "") for text in pair] for pair in pairs]
    lines = [f"SCORE ||| {reference} ||| {prediction}" for prediction, reference in texts]
    program = start_meteor()
    try:
        rows = [line.split() for line in program.answers(lines)]
        if [len(row) for row in rows] != [SEGMENT_STATISTICS] * len(pairs):
            raise UserError(WRONG_ANSWER)
    except BaseException:  # an interruption leaves answers unread
        program.close()
        raise
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


def start_meteor() -> "MeteorProgram":
    """Start METEOR's program if it does not run: it reads its tables for seconds, while the caller may go on.

    Raises:
        UserError: `pycocoevalcap` or Java is not installed.
    """
    return _program_of(shutil.which("java"))


@functools.cache
def _program_of(java: str | None) -> "MeteorProgram":
    return MeteorProgram()


class MeteorProgram:
    """METEOR's jar, which answers as long as this process lives. See `start_meteor`."""

    def __init__(self):
        meteor = _pycocoevalcap("meteor.meteor")
        options = ["-jar", "-Xmx2G", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the program)
        self._process = _start_java(meteor, options, self._errors)
        atexit.register(self.close)

    def answers(self, lines: Sequence[str]) -> list[str]:
        """Return the line that the program answers to each of `lines`.

        Raises:
            UserError: it has ended by an error.
        """
        # Not until the end of its output: forked workers may hold its input open
        with ThreadPoolExecutor(max_workers=1) as beside:  # else both wait when the pipes are full
            beside.submit(self._send, "".join(f"{line}\n" for line in lines))
            found = [self._process.stdout.readline().decode("utf-8") for _ in lines]
        if found[-1:] == [""]:
            self._errors.seek(0)
            _refuse_failed(self._process.wait(), self._errors.read())
        return found

    def _send(self, text: str) -> None:
        self._process.stdin.write(text.encode("utf-8", errors="replace"))  # JSON can hold an unpaired surrogate
        self._process.stdin.flush()

    def close(self) -> None:
        """End the program; the next `start_meteor` starts another."""
        _program_of.cache_clear()
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                file.close()


def _meteor(sums: np.ndarray, number: int) -> np.ndarray:
    """Return METEOR 1.5 `[...]` of sums `[..., 6]`: Denkowski and Lavie (2014); `computeMetrics` in the jar.

    The jar prints all 17 digits of its float64; the two agree to 1e-12.
    """
    test_matches, reference_matches, test_length, reference_length, chunks, words = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # no match at all: 0, as in the jar
        precision, recall = test_matches / test_length, reference_matches / reference_length
        f_mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        return np.nan_to_num(f_mean * (1 - GAMMA * (chunks / words) ** BETA), nan=0.0).clip(min=0)


# --- What may be missing --------------------------------------------------------------------------------------


def _pycocoevalcap(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise UserError("pycocoevalcap is not installed: `pip install pycocoevalcap`") from error


def _java(library: ModuleType, options: list[str], lines: list[str]) -> list[str]:
    """Run a jar that lies beside the module `library`, and return the lines that it answers."""
    text = "\n".join(lines).encode("utf-8", errors="replace")  # JSON can hold an unpaired surrogate
    with _start_java(library, options, subprocess.PIPE) as run:
        output, errors = run.communicate(text)
    _refuse_failed(run.returncode, errors)
    return output.decode("utf-8").split("\n")


def _start_java(library: ModuleType, options: list[str], errors: Any) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
    try:
        return subprocess.Popen(["java", *JVM_OPTIONS, *options], cwd=Path(library.__file__).parent, **pipes)
    except OSError as error:
        raise UserError(f"`java` cannot be run ({error.strerror}): {INSTALL_JAVA}") from error


def _refuse_failed(status: int, errors: bytes) -> None:
    if status:
        reason = " ".join(errors.decode(errors="replace").split())[:200]
        raise UserError(f"`java` failed with status {status} ({reason}): {INSTALL_JAVA}")
