"""The surface form of captions, which a tokenizer that lower-cases and spaces out punctuation loses.

`pa x - ray ( arrow )` was "PA X-ray (arrow)". `SurfaceForm` learns from the training captions how each word and each
punctuation mark is written most often there, and writes what was decoded in the same way.

`surface_form.json` beside the model holds what was learned. `forms` says how a piece is written: a word in its case,
`"ct": "CT"`, a mark with the spaces around it, `"W - ray": "-"`. The first of three keys that is there counts: with
the kind of the left neighbor and the right neighbor; with the kinds of both; the piece alone. Kinds are W, a word; L,
a letter; N, a number; a mark itself; and nothing at the ends of a caption. A word without a form begins with a capital
after the kinds of `capital_after`.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import cached_file

from captioning.errors import as_user_error
from captioning.files import write_whole


FILE = "surface_form.json"
MIN_USES = 2  # of a form in the training captions; once may be a slip
# What BERT's tokenizer splits words at: ASCII's, and those of other blocks that captions hold
PUNCTUATION = r"!-/:-@\[-`{-~¡§«¶·»¿‐-‧‰-⁞"
PIECE = re.compile(rf"[{PUNCTUATION}]|[^\s{PUNCTUATION}]+")
WRITTEN = re.compile(rf"(\s*)([{PUNCTUATION}])(?=(\s*))|([^\s{PUNCTUATION}]+)")  # spaces, mark, spaces; or a word
MARK = re.compile(rf"[{PUNCTUATION}]")
KINDS = ("", "W", "L", "N")  # in capitals, which no piece is
COMPARED = re.compile(r"[a-z0-9]+")  # the words of `rouge_score`

Use = tuple[str, str, str, str]  # left neighbor, piece, right neighbor, form


@dataclass(frozen=True)
class SurfaceForm:
    """What was learned of the surface form: see the top of this file."""

    forms: dict[str, str]
    capital_after: list[str]

    @classmethod
    def learn(cls, captions: Iterable[str], texts: Iterable[str]) -> "SurfaceForm":
        """Learn from captions and their decoded tokens; one of which the tokenizer lost a piece is left out."""
        uses: Counter[Use] = Counter()
        for caption, text in zip(captions, texts, strict=True):
            found = WRITTEN.findall(without_accents(caption).strip())
            pieces = PIECE.findall(text)
            if [(mark or word).lower() for _, mark, _, word in found] == pieces:
                forms = [word or " "[: len(left)] + mark + " "[: len(right)] for left, mark, right, word in found]
                uses.update(zip(["", *pieces], pieces, [*pieces[1:], ""], forms, strict=False))
        return cls._from_uses(uses)

    @classmethod
    def _from_uses(cls, uses: Counter[Use]) -> "SurfaceForm":
        levels: list[Counter[tuple[str, str]]] = [Counter() for _ in range(3)]
        for (left, piece, right, form), number in uses.items():
            for level, key in zip(levels, _form_keys(left, piece, right), strict=True):
                level[key, form] += number
        most = _most_used(levels.pop())
        learned = cls({piece: form for piece, form in most.items() if form != _as_decoded(piece)}, [])
        learned.capital_after.extend(_capital_after(uses, learned.forms))
        for level in reversed(levels):  # a key goes in only where the more general ones predict another form
            found = _most_used(level).items()
            learned.forms.update([(key, form) for key, form in found if learned.form(*key.split(" ")) != form])
        return learned

    @classmethod
    def load(cls, name: str, revision: str | None = None) -> "SurfaceForm | None":
        """Read what lies beside a model on the Hub or in a folder, None if there is nothing.

        Raises:
            UserError: the file cannot be read.
        """
        path = cached_file(
            name, FILE, revision=revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if path is None:
            return None
        with as_user_error(f"model '{name}': {FILE} cannot be read", "leave out the file"):
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            forms, capital_after = dict(content["forms"]), list(content["capital_after"])
            if not all(isinstance(form, str) and form.strip() for form in forms.values()):
                raise ValueError("a form is not a text")
            return cls(forms, capital_after)

    def form(self, left: str, piece: str, right: str) -> str:
        """Return a word in its case, a punctuation mark with the spaces around it; neighbors may be kinds."""
        for key in _form_keys(left, piece, right):
            if key in self.forms:
                return self.forms[key]
        if piece[0].isalpha() and _kind(left) in self.capital_after:
            return piece[0].upper() + piece[1:]
        return _as_decoded(piece)

    def restore(self, text: str) -> str:
        """Return decoded text as it would be written; where that had other words for ROUGE, the text itself."""
        pieces = PIECE.findall(text)
        words, spaces = [], [" "] * (len(pieces) + 1)
        for i, (left, piece, right) in enumerate(zip(["", *pieces], pieces, [*pieces[1:], ""], strict=False)):
            form = self.form(left, piece, right)
            if MARK.match(piece):
                spaces[i], spaces[i + 1] = " " * (form[0] == " "), " " * (form[-1] == " ")
            words.append(form.strip())
        written = "".join(space + word for space, word in zip(spaces, words, strict=False)).strip()
        return written if COMPARED.findall(written.lower()) == COMPARED.findall(text.lower()) else text

    def save(self, folder: str | Path) -> None:
        """Write `surface_form.json` into a folder."""
        content = {"capital_after": self.capital_after, "forms": dict(sorted(self.forms.items()))}
        write_whole(Path(folder) / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _form_keys(left: str, piece: str, right: str) -> tuple[str, str, str]:
    """Return the keys of `SurfaceForm.forms` for a piece, that which counts first in front."""
    kind = _kind(left)
    return f"{kind} {piece} {right}", f"{kind} {piece} {_kind(right)}", piece


def _kind(piece: str) -> str:
    if piece in KINDS or MARK.match(piece):
        return piece
    if piece[0].isdigit():
        return "N"
    return "L" if len(piece) == 1 else "W"


def _as_decoded(piece: str) -> str:
    return f" {piece} " if MARK.match(piece) else piece


def _most_used(counts: Counter[tuple[str, str]]) -> dict[str, str]:
    """Return by key the form of more than half of its uses, if these are at least `MIN_USES`."""
    totals: Counter[str] = Counter()
    for (key, _), number in counts.items():
        totals[key] += number
    return {key: form for (key, form), number in counts.items() if number >= MIN_USES and 2 * number > totals[key]}


def _capital_after(uses: Counter[Use], forms: dict[str, str]) -> list[str]:
    capital: Counter[str] = Counter()
    for (left, piece, _, form), number in uses.items():
        if piece[0].isalpha() and piece not in forms:
            capital[_kind(left)] += number if form[0].isupper() else -number
    return sorted(kind for kind, surplus in capital.items() if surplus > 0)


def without_accents(caption: str) -> str:
    """Return a caption without accents and control characters, as BERT's tokenizer reads it."""
    if caption.isascii():
        return caption
    decomposed = unicodedata.normalize("NFD", caption)
    return "".join(c for c in decomposed if c.isspace() or unicodedata.category(c) not in ("Mn", "Cc", "Cf"))
