"""Text made fit for pre-training at the party that holds it; only counts leave.

One pass over a stream of documents: quality rules, language, personal data masked, near-duplicates removed, and what
repeats a protected text word for word. Each document is kept, changed or dropped for one reason, and the reasons are
counted. Memory grows with the documents kept by a signature of ``PERMUTATIONS`` numbers each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mycel.errors import DataError, ExtraMissing

PERMUTATIONS = 64
SHINGLE = 5  # words
SPAN = 50  # characters: a shorter common part says nothing of copying

MASKS = (
    ("<email>", re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")),
    ("<iban>", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b")),
    ("<card>", re.compile(r"\b\d(?:[ -]?\d){12,18}\b")),
    ("<address>", re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b")),
    ("<phone>", re.compile(r"(?<![\w.])\+?\d{1,3}[ -]?\(?\d{2,4}\)?(?:[ -]?\d{2,4}){2,4}(?![\w.])")),
)
COMMON_WORDS = {
    "en": {"the", "of", "and", "to", "in", "is", "that", "for", "it", "with", "as", "be", "are", "or", "this", "if"},
    "de": {"der", "die", "und", "das", "ist", "nicht", "ein", "zu", "den", "von", "mit", "auf", "eine", "für", "sich"},
    "fr": {"le", "la", "les", "et", "des", "est", "que", "une", "dans", "pour", "pas", "qui", "sur", "du", "un"},
    "es": {"el", "los", "que", "de", "es", "una", "por", "con", "para", "las", "del", "se", "su", "como", "y"},
}
WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Rules:
    """What a document must be like.

    Attributes
    ----------
    shortest : int
        Characters.
    letters : float
        Least share of letters and spaces.
    repeated : float
        Largest share of lines that occur before in the same document.
    language : str
        One of ``COMMON_WORDS`` whose words must be the most common here; empty: any.
    similarity : float
        Jaccard similarity of word shingles from which a document counts as a copy; 0: copies stay.
    masks : bool
        Whether addresses and numbers of persons are masked.
    """

    shortest: int = 40
    letters: float = 0.6
    repeated: float = 0.5
    language: str = ""
    similarity: float = 0.8
    masks: bool = True

    def __post_init__(self) -> None:
        if self.language and self.language not in COMMON_WORDS:
            raise DataError(f"the language {self.language!r} is not known: use one of {', '.join(COMMON_WORDS)}")
        if not 0 <= self.similarity <= 1:
            raise DataError(f"the similarity {self.similarity} does not lie between 0 and 1")


@dataclass
class Cleaner:
    """Cleans one party's stream of documents.

    Parameters
    ----------
    protected : iterable of str
        Texts that what is kept may not repeat: ``2 SPAN`` characters in common are always found, ``SPAN`` sometimes.

    Attributes
    ----------
    counts : Counter of str
        Documents kept, and dropped by reason; masks by kind. All that may leave.
    """

    rules: Rules = field(default_factory=Rules)
    protected: Iterable[str] = ()
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._spans = {span for text in self.protected for span in _spans(_plain(text), SPAN)}
        self._copies = Copies(self.rules.similarity) if self.rules.similarity else None

    def clean(self, documents: Iterable[str]) -> Iterator[str]:
        """Yield the documents that are kept, masked, in their order."""
        for document in documents:
            if self.keeps(document):
                yield self.masked(document)

    def keeps(self, document: str) -> bool:
        """Whether a document stays; why not is counted."""
        reason = fault(document, self.rules) or self._copied(document)
        self.counts[reason or "kept"] += 1
        return not reason

    def _copied(self, document: str) -> str:
        if self._spans and any(span in self._spans for span in _spans(_plain(document), 1)):
            return "protected"
        return "copy" if self._copies is not None and self._copies.known(document) else ""

    def masked(self, document: str) -> str:
        """The document with what names a person replaced, if the rules say so."""
        for mask, pattern in MASKS if self.rules.masks else ():
            document, found = pattern.subn(mask, document)
            if found:
                self.counts[f"masked {mask}"] += found
        return document


def fault(document: str, rules: Rules) -> str:
    """Return why a document is not fit, or an empty text."""
    text = document.strip()
    if len(text) < rules.shortest:
        return "short"
    letters = sum(character.isalpha() or character.isspace() for character in text)
    if letters < rules.letters * len(text):
        return "letters"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 2 and len(lines) - len(set(lines)) > rules.repeated * len(lines):
        return "repeated"
    return "language" if rules.language and language_of(text) != rules.language else ""


def language_of(text: str) -> str:
    """Language whose common words are the most here; empty when none occurs."""
    words = Counter(word.casefold() for word in WORD.findall(text))
    scores = {name: sum(words[word] for word in known) for name, known in COMMON_WORDS.items()}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] else ""


class Copies:
    """Finds near-duplicates of what came before, by MinHash over word shingles (the ``datasketch`` library).

    Parameters
    ----------
    similarity : float
        Jaccard similarity from which two documents are copies of each other.
    """

    def __init__(self, similarity: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ExtraMissing("datasketch", "corpus") from error
        self._make = MinHash
        self._similarity = similarity
        self._known = MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS)
        self._signatures: dict[str, object] = {}

    def known(self, document: str) -> bool:
        """Whether something like it came before; if not, it is remembered."""
        signature = self._make(num_perm=PERMUTATIONS)
        signature.update_batch([shingle.encode() for shingle in shingles(document)])
        # Buckets propose candidates; the signatures themselves decide.
        if any(signature.jaccard(self._signatures[key]) >= self._similarity for key in self._known.query(signature)):
            return True
        key = str(len(self._signatures))
        self._known.insert(key, signature)
        self._signatures[key] = signature
        return False


def shingles(document: str) -> set[str]:
    """Runs of ``SHINGLE`` words, case and spacing aside; the whole text when it has fewer."""
    words = document.casefold().split()
    return {" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _spans(text: str, stride: int) -> Iterator[str]:
    """Pieces of ``SPAN`` characters; a common part of ``2 SPAN`` holds a piece of one side, wherever it stands."""
    for start in range(0, len(text) - SPAN + 1, stride):
        yield text[start : start + SPAN]
