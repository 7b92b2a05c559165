"""The field's metrics, with the values of their reference implementations.

`coco_scores` are BLEU-1 to BLEU-4, CIDEr, ROUGE-L and METEOR as `pycocoevalcap` 1.2 gives them (Chen et al., 2015,
arXiv:1504.00325): its tokenizer and its METEOR, which are Java programs, and the formulas of the other three on
n-grams that are counted once for all systems. `bertscore` is the BERTScore of ImageCLEFmedical Caption (`bert-score`
0.3.13). What cannot be computed is named, with one line that says what is missing and the mend. Nothing is
downloaded, and nothing of what the libraries print reaches the user.
"""

import contextlib
import functools
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, diags

from captioning.errors import UserError
from captioning.scoring.bootstrap import Score
from metrics import lcs_length


TOKENIZERS = {"ptb": "coco", "whitespace": "nlgeval"}  # and how the names of their scores begin

INSTALL_JAVA = "install a Java runtime, e.g. `apt install default-jre-headless`"
INSTALL_PYCOCOEVALCAP = "pycocoevalcap is not installed: `pip install pycocoevalcap`"

CIDER_SIGMA = 6.0  # of the length penalty: `pycocoevalcap.cider.cider_scorer.CiderScorer`
ROUGE_BETA = 1.2  # of `pycocoevalcap.rouge.rouge.Rouge`; rouge_score weighs precision and recall alike
# METEOR 1.5 for English: Denkowski and Lavie (2014), aclanthology.org/W14-3348; the jar's defaults
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MODULE_WEIGHTS = (1.0, 0.6, 0.8, 0.6)  # of exact, stem, synonym and paraphrase matches
SEGMENT_STATISTICS = 23  # numbers in the jar's answer to one `SCORE` line


class MissingError(UserError):
    """A library, a program or weights are not at hand; the message is one line: what is missing, and the mend."""


# Tokens


def coco_tokens(captions: Sequence[str], tokenizer: str = "ptb") -> list[str]:
    """Return the tokens of each caption, joined by a space, as the scorers of `pycocoevalcap` take them.

    Tokenize the references once and each system's predictions once: `coco_scores_of_tokens` starts no tokenizer. The
    captions of one list go through one Java process, as `COCOEvalCap` sends them. Do not join the lists of two
    systems: an abbreviation at the end of a caption ("No.") is read with the start of the next caption.

    Args:
        captions: N captions. Each is made one line first: the tokenizer works by line, and the library itself only
            takes out line feeds, so that a carriage return would shift all captions after it.
        tokenizer: "ptb" for Stanford's PTBTokenizer, lower-case and without punctuation, as `COCOEvalCap` does, which
            leaves brackets in as `-lrb-` and `-rrb-`: its list has them in upper case only;
            "whitespace" to leave the text as it is but for its ends, as `nlg-eval` does.

    Raises:
        MissingError: with "ptb", `pycocoevalcap` or Java is not there.
        ValueError: the tokenizer is neither.
    """
    lines = [one_line(caption) for caption in captions]
    if tokenizer == "whitespace":
        return [line.strip() for line in lines]
    if tokenizer != "ptb":
        raise ValueError(f"the tokenizer is {tokenizer!r}; it can be {' or '.join(TOKENIZERS)}")
    if not lines:
        return []
    with _pycocoevalcap():
        from pycocoevalcap.tokenizer import ptbtokenizer

    # From standard input: the library writes a file into its own package folder, which can be read-only
    options = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    output = _java(ptbtokenizer, ["-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, *options], lines)
    if len(output) != len(lines):
        raise MissingError(_wrong_answer(f"{len(output)} lines for {len(lines)} captions"))
    removed = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in removed) for line in output]


def one_line(caption: str) -> str:
    r"""Return the caption with each line break, of all that `str.splitlines` knows (`\r`, U+2028, ...), a space."""
    return " ".join(caption.splitlines())


# BLEU, CIDEr, ROUGE-L and METEOR


def coco_scores(
    predictions: Sequence[str], references: Sequence[str], tokenizer: str = "ptb", meteor: bool = True
) -> tuple[dict[str, Score], dict[str, str]]:
    """Score N captions against one reference each as `COCOEvalCap` or, by white space, as `nlg-eval` does.

    Args:
        predictions: N captions.
        references: N captions, of which CIDEr takes its document frequencies.
        tokenizer: see `coco_tokens`.
        meteor: compute METEOR, most of the time that this takes.

    Returns:
        The scores `coco_bleu1` to `coco_bleu4`, `coco_cider` (from 0 to 10), `coco_rougeL` and `coco_meteor`, or with
        "whitespace" the same names from `nlgeval_` on; and for each that could not be computed one line that says what
        is missing and the mend.

    Raises:
        ValueError: there are not as many predictions as references, or none, or the tokenizer is unknown.
    """
    _check_pairs(predictions, references)
    try:
        tokens = [coco_tokens(captions, tokenizer) for captions in (predictions, references)]
    except MissingError as error:
        return {}, dict.fromkeys(_names(TOKENIZERS[tokenizer], meteor), str(error))
    return coco_scores_of_tokens(*tokens, TOKENIZERS[tokenizer], meteor)


def coco_scores_of_tokens(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    prefix: str = "coco",
    meteor: bool = True,
) -> tuple[dict[str, Score], dict[str, str]]:
    """Score N captions that `coco_tokens` has prepared: `coco_scores_of_systems` for one system."""
    found, missing = coco_scores_of_systems({"": predictions}, references, prefix, [""] if meteor else [])
    return found[""], missing


def coco_scores_of_systems(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str | Sequence[str]],
    prefix: str = "coco",
    with_meteor: Collection[str] = (),
) -> tuple[dict[str, dict[str, Score]], dict[str, str]]:
    """Score the captions of several systems, that `coco_tokens` has prepared, on the same N images.

    The values are those of `pycocoevalcap`: `Bleu(4)` (reference length "closest", with its constants against a
    division by zero), `Cider()`, `Rouge()` (ROUGE-L with beta 1.2) and `Meteor()`. The first three count words
    themselves: the library takes five times as long, and twenty for a common subsequence.

    Args:
        systems: of each N captions, tokenized.
        references: of each image one tokenized reference, or a list of them.
        prefix: what the names begin with: "coco", or "nlgeval" for "whitespace".
        with_meteor: the systems that have METEOR computed, most of the time that this takes: all from one start of the
            jar, which takes seconds.

    Returns:
        By system its scores, as `coco_scores`; and what is missing.

    Raises:
        ValueError: there are not as many predictions as references, or none, or a caption has no reference.
    """
    for predictions in systems.values():
        _check_pairs(predictions, references)
    references = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    if not all(references):
        raise ValueError("a caption has no reference")
    ngrams = _Ngrams(references)
    found: dict[str, dict[str, Score]] = {}
    for name, predictions in systems.items():
        bleu, cider = ngrams.bleu_and_cider(predictions)
        found[name] = {f"{prefix}_bleu{n}": Score(bleu, functools.partial(_bleu, n)) for n in range(1, 5)}
        found[name][f"{prefix}_cider"] = Score.of(cider)
        found[name][f"{prefix}_rougeL"] = Score.of(_rouge_l(list(zip(predictions, references, strict=True))))
    if not with_meteor:
        return found, {}
    pairs = [pair for name in with_meteor for pair in zip(systems[name], references, strict=True)]
    try:
        statistics = np.split(_meteor_statistics(pairs), len(with_meteor))
    except MissingError as error:
        return found, {f"{prefix}_meteor": str(error)}
    for name, own in zip(with_meteor, statistics, strict=True):
        found[name][f"{prefix}_meteor"] = Score(own, _meteor)
    return found, {}


def _names(prefix: str, meteor: bool) -> list[str]:
    names = ["bleu1", "bleu2", "bleu3", "bleu4", "cider", "rougeL", "meteor"]
    return [f"{prefix}_{name}" for name in names if meteor or name != "meteor"]


def _check_pairs(predictions: Sequence[str], references: Sequence) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"there are {len(predictions)} predictions, but {len(references)} references")
    if not len(predictions):
        raise ValueError("there are no captions to score")


class _Ngrams:
    """The 1- to 4-grams of the references, against which one system after the other is counted."""

    def __init__(self, references: Sequence[Sequence[str]]):
        self.number = len(references)
        self.columns: dict[tuple[str, ...], int] = {}
        self.references = np.array([len(texts) for texts in references])
        # The k-th reference of each image; an image that has fewer has an empty one there, which matches nothing
        texts = [[own[k] if k < len(own) else "" for own in references] for k in range(self.references.max())]
        self.counts = [self._count(own) for own in texts]
        self.lengths = np.array([[len(text.split()) for text in own] for own in texts])
        self.given = np.arange(len(texts))[:, None] < self.references
        self.most = functools.reduce(lambda a, b: a.maximum(b), self._widened())

    def bleu_and_cider(self, predictions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return BLEU's statistics `[N, 10]` and the CIDEr `[N]` of a system.

        The former are the possible and the matched 1- to 4-grams, the length, the closest reference's length; CIDEr is
        from 0 to 10, and 0 of a single caption, whose idf is log(1 / 1).
        """
        counts = self._count(predictions)
        references, most = self._widened(), self._wide(self.most)
        order = np.zeros((len(self.columns), 4))
        order[np.arange(len(self.columns)), [len(ngram) - 1 for ngram in self.columns]] = 1
        matched = counts.minimum(most) @ order
        lengths = np.array([len(text.split()) for text in predictions])
        # The closest, and of two as close the shorter (`BleuScorer._single_reflen`)
        distance = np.where(self.given, np.abs(self.lengths - lengths) + self.lengths / 1e6, np.inf)
        closest = self.lengths[distance.argmin(axis=0), np.arange(self.number)]
        bleu = np.column_stack([counts @ order, matched, lengths, closest]).astype(np.float64)

        in_images = np.bincount(most.indices, minlength=len(self.columns))  # "document frequency"
        idf = diags(np.log(self.number) - np.log(np.maximum(in_images, 1)))
        own = counts @ idf
        own_norm = np.sqrt(own.multiply(own) @ order)
        total = np.zeros((self.number, 4))
        for reference, length in zip(references, self.lengths, strict=True):
            weights = reference @ idf
            norm = own_norm * np.sqrt(weights.multiply(weights) @ order)
            similarity = own.minimum(weights).multiply(weights) @ order
            # The length of a caption is its number of 2-grams
            difference = np.maximum(lengths - 1, 0) - np.maximum(length - 1, 0)
            penalty = np.exp(-(difference**2) / (2 * CIDER_SIGMA**2))[:, None]
            total += np.divide(similarity, norm, out=np.zeros_like(norm), where=norm > 0) * penalty
        return bleu, 10 * total.mean(axis=1) / self.references

    def _count(self, texts: Sequence[str]) -> csr_matrix:
        """Return how often each caption has each n-gram, `[N, columns]`; new n-grams get new columns."""
        columns, starts = [], [0]
        for text in texts:
            words = text.split()
            for n in range(1, 5):
                for i in range(len(words) - n + 1):
                    columns.append(self.columns.setdefault(tuple(words[i : i + n]), len(self.columns)))
            starts.append(len(columns))
        counts = csr_matrix((np.ones(len(columns)), columns, starts), (len(texts), len(self.columns)))
        counts.sum_duplicates()
        return counts

    def _widened(self) -> list[csr_matrix]:
        return [self._wide(counts) for counts in self.counts]

    def _wide(self, counts: csr_matrix) -> csr_matrix:
        """Return the counts with an empty column for each n-gram that was met since."""
        return csr_matrix((counts.data, counts.indices, counts.indptr), (counts.shape[0], len(self.columns)))


def _bleu(n: int, sums: np.ndarray, number: int) -> np.ndarray:
    """Return BLEU-n `[...]` of sums `[..., 10]`, by `BleuScorer.compute_score`'s formula."""
    small, tiny = 1e-9, 1e-15  # the scorer's: no division by zero, and yet 0 where nothing is possible
    guess, correct, (length, reference_length) = sums[..., :n], sums[..., 4 : 4 + n], np.moveaxis(sums[..., 8:], -1, 0)
    precision = np.prod((correct + tiny) / (guess + small), axis=-1) ** (1 / n)
    ratio = (length + tiny) / (reference_length + small)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


def _rouge_l(pairs: list[tuple[str, list[str]]]) -> np.ndarray:
    """Return the ROUGE-L of each caption, `[N]`, from 0 to 1.

    `Rouge.calc_score`'s formula over a faster longest common subsequence: the best precision and the best recall of
    all references, not those of one. A token is what lies between two single spaces, as there.
    """
    scores = []
    for text, references in pairs:
        words, others = text.split(" "), [reference.split(" ") for reference in references]
        common = [lcs_length(words, other) for other in others]
        precision = max(number / len(words) for number in common)
        recall = max(number / len(other) for number, other in zip(common, others, strict=True))
        weighted = recall + ROUGE_BETA**2 * precision
        scores.append((1 + ROUGE_BETA**2) * precision * recall / weighted if precision and recall else 0.0)
    return np.array(scores)


def _meteor_statistics(pairs: list[tuple[str, list[str]]]) -> np.ndarray:
    """Return float `[N, 6]`, what each caption adds to METEOR's sums.

    They are the weighted matches in the prediction and in the reference that fits it best, the weighted lengths of
    both, the chunks, and the matched words (the mean of both sides). The jar's answer to a `SCORE` line is the lengths
    and the function words of both, for each module the matched content and function words of both, the chunks and the
    matched words of both.
    """
    with _pycocoevalcap():
        from pycocoevalcap.meteor import meteor

    # "|||" separates the fields. The library takes it out of predictions alone: a reference with it would become two
    texts = [[*map(one_line, references), one_line(prediction)] for prediction, references in pairs]
    lines = [" ||| ".join(["SCORE", *(text.replace("|||", "") for text in fields)]) for fields in texts]
    options = ["-jar", "-Xmx2G", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
    answer = _java(meteor, options, lines)
    try:
        table = np.array([line.split() for line in answer[:-1]], dtype=np.float64)
    except ValueError as error:
        raise MissingError(_wrong_answer("no table of numbers")) from error
    if table.shape != (len(pairs), SEGMENT_STATISTICS):
        raise MissingError(_wrong_answer(f"a table of {table.shape} for {len(pairs)} captions"))

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
    """Return METEOR 1.5 `[...]` of sums `[..., 6]`: Denkowski and Lavie (2014); `computeMetrics` in the jar.

    The score of a set is this function of the sums, not a mean over captions. The jar prints all 17 digits of its
    float64; the two agree to 1e-12.
    """
    test_matches, reference_matches, test_length, reference_length, chunks, words = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # no match at all: 0, as in the jar
        precision, recall = test_matches / test_length, reference_matches / reference_length
        f_mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        return np.nan_to_num(f_mean * (1 - GAMMA * (chunks / words) ** BETA), nan=0.0).clip(min=0)


@contextlib.contextmanager
def _pycocoevalcap() -> Iterator[None]:
    """Name the package where an import of the block fails."""
    try:
        yield
    except ImportError as error:
        raise MissingError(INSTALL_PYCOCOEVALCAP) from error


def _java(library, options: list[str], lines: list[str]) -> list[str]:
    """Return the lines that a jar beside the module `library` answers; the process has ended when this returns."""
    text = "\n".join(lines).encode("utf-8", errors="replace")  # JSON can hold half a surrogate pair
    try:
        run = subprocess.run(["java", *options], input=text, capture_output=True, cwd=Path(library.__file__).parent)
    except OSError as error:
        raise MissingError(_no_java(f"`java` cannot be run ({error.strerror})", library)) from error
    if run.returncode:
        reason = " ".join(run.stderr.decode(errors="replace").split())[:200]
        raise MissingError(_no_java(f"`java` failed with status {run.returncode} ({reason})", library))
    return run.stdout.decode("utf-8").split("\n")


def _wrong_answer(what: str) -> str:
    return f"`java` runs, but answers with {what}: {INSTALL_JAVA}"


def _no_java(reason: str, library) -> str:
    without = ", or use --tokenizer whitespace" if library.__name__.endswith("ptbtokenizer") else ""
    return f"{reason}: {INSTALL_JAVA}{without}"
