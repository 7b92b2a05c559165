"""The surface form of captions, which a tokenizer that lower-cases and spaces out punctuation loses.

`pa x - ray ( arrow )` was "PA X-ray (arrow)". `surface_form.json` beside the model has how the training captions write
each piece most often. Its `forms` hold a word in its case, `"ct": "CT"`, a mark with the spaces around it, `"W - ray":
"-"`. The first of three keys that is there counts: with the kind of the left neighbor and the right neighbor; with the
kinds of both; the piece alone. Kinds are W, a word; L, a letter; N, a number; a mark itself; nothing at the ends of a
caption. A word without a form begins with a capital after the kinds in `capital_after`.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from captioning.errors import as_user_error
from captioning.files import write_whole
from captioning.models.optional_file import optional_file


FILE = "surface_form.json"
MIN_USES = 2  # of a form in the training captions; once may be a slip
MARKS = r"!-/:-@\[-`{-~¡§«¶·»¿‐-‧‰-⁞"  # where BERT's tokenizer splits words, as far as captions hold such characters
MARK, PIECE = re.compile(rf"[{MARKS}]"), re.compile(rf"[{MARKS}]|[^\s{MARKS}]+")
WRITTEN = re.compile(rf"(\s*)([{MARKS}])(?=(\s*))|([^\s{MARKS}]+)")  # spaces, mark, spaces; or a word
COMPARED = re.compile(r"[a-z0-9]+")  # the words of `rouge_score`


@dataclass(frozen=True)
class SurfaceForm:
    """What was learned of the surface form: see the top of this file."""

    forms: dict[str, str]
    capital_after: list[str]

    @classmethod
    def learn(cls, captions: Iterable[str], texts: Iterable[str]) -> "SurfaceForm":
        """Learn from captions and their decoded tokens; one of which the tokenizer lost a piece is left out."""
        uses: Counter[tuple[str, str, str, str]] = Counter()  # left neighbor, piece, right neighbor, form
        for caption, text in zip(captions, texts, strict=True):
            found, pieces = WRITTEN.findall(without_accents(caption).strip()), PIECE.findall(text)
            if [(mark or word).lower() for _, mark, _, word in found] == pieces:
                forms = [word or " "[: len(left)] + mark + " "[: len(right)] for left, mark, right, word in found]
                uses.update(zip(["", *pieces], pieces, [*pieces[1:], ""], forms, strict=False))
        levels: list[Counter[tuple[str, str]]] = [Counter(), Counter(), Counter()]
        for (left, piece, right, form), number in uses.items():
            for level, key in zip(levels, _form_keys(left, piece, right), strict=True):
                begins = level is levels[2] and left in ("", ".") and form.isalpha() and form.istitle()
                level[key, piece if begins else form] += number  # "Axial" of "Axial view" is no form of its own
        learned, most = cls({}, []), _most_used(levels[2]).items()
        learned.forms.update([(piece, form) for piece, form in most if learned.form("", piece, "") != form])
        capitals: Counter[str] = Counter()
        for (left, piece, _, form), number in uses.items():
            if piece[0].isalpha() and piece not in learned.forms:
                capitals[_kind(left)] += number if form[0].isupper() else -number
        learned.capital_after.extend(sorted(kind for kind, surplus in capitals.items() if surplus > 0))
        for level in (levels[1], levels[0]):  # a key goes in where the more general ones predict another form
            most = _most_used(level).items()
            learned.forms.update([(key, form) for key, form in most if learned.form(*key.split(" ")) != form])
        return learned

    @classmethod
    def load(cls, name: str, revision: str | None = None) -> "SurfaceForm | None":
        """Read what lies beside a model on the Hub or in a folder, None if there is none; UserError: it is broken."""
        path = optional_file(name, FILE, revision)
        with as_user_error(f"model '{name}': {FILE} cannot be read", "leave out the file"):
            found = path and cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            if found and not (all(map(str.strip, found.forms.values())) and isinstance(found.capital_after, list)):
                raise ValueError("a form is empty, or capital_after is no list")
        return found

    def save(self, folder: str | Path) -> None:
        """Write `surface_form.json` into a folder."""
        content = json.dumps(vars(self), indent=1, ensure_ascii=False, sort_keys=True)
        write_whole(Path(folder) / FILE, content + "\n")

    def form(self, left: str, piece: str, right: str) -> str:
        """Return a word in its case, a punctuation mark with the spaces around it; neighbors may be kinds."""
        for key in _form_keys(left, piece, right):
            if key in self.forms:
                return self.forms[key]
        if piece[0].isalpha() and _kind(left) in self.capital_after:
            return piece[0].upper() + piece[1:]
        return f" {piece} " if MARK.match(piece) else piece

    def restore(self, text: str) -> str:
        """Return decoded text as it would be written; where that had other words for ROUGE, the text itself."""
        pieces = PIECE.findall(text)
        words, spaces = [], [" "] * (len(pieces) + 1)
        for i, (left, piece, right) in enumerate(zip(["", *pieces], pieces, [*pieces[1:], ""], strict=False)):
            form = self.form(left, piece, right)
            if MARK.match(piece):
                spaces[i], spaces[i + 1] = " " * form.startswith(" "), " " * form.endswith(" ")
            words.append(form.strip())
        written = "".join(space + word for space, word in zip(spaces, words, strict=False)).strip()
        return written if COMPARED.findall(written.lower()) == COMPARED.findall(text.lower()) else text


def _form_keys(left: str, piece: str, right: str) -> tuple[str, str, str]:
    return f"{_kind(left)} {piece} {right}", f"{_kind(left)} {piece} {_kind(right)}", piece


def _kind(piece: str) -> str:
    if piece in ("", "W", "L", "N") or MARK.match(piece):  # a kind itself: no piece has capitals
        return piece
    return "N" if piece[0].isdigit() else "L" if len(piece) == 1 else "W"


def _most_used(counts: Counter[tuple[str, str]]) -> dict[str, str]:
    """Return by key the form of more than half of its uses, if these are at least `MIN_USES`."""
    totals: Counter[str] = Counter()
    for (key, _), number in counts.items():
        totals[key] += number
    return {key: form for (key, form), number in counts.items() if number >= MIN_USES and 2 * number > totals[key]}


def without_accents(caption: str) -> str:
    """Return a caption without accents and control characters, as BERT's tokenizer reads it."""
    decomposed = caption if caption.isascii() else unicodedata.normalize("NFD", caption)
    return "".join(c for c in decomposed if c.isspace() or unicodedata.category(c) not in ("Mn", "Cc", "Cf"))
