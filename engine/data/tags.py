"""Tags of words and the entities they spell: BIO (IOB2), IOB1, IOBES and BILOU, read as conlleval reads them.

An entity tag is a prefix, a hyphen and a type (B-person), or O outside. What a sequence of tags that is not well-formed
means is a convention: conlleval's, which seqeval's default mode shares, starts an entity wherever the type changes;
`strict` counts only what begins with B and goes on with I of its type, as seqeval's strict mode of IOB2.

Everything is turned into BIO when it is read. Rejected: keeping the scheme of the file; metric, table and prediction
files would each need to know all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OUTSIDE = "O"
UNTAGGED = -101
"""Label of a word whose tag is not known."""
_PREFIXES = "BIESLU"
Entity = tuple[str, int, int]
"""Type, first word, and the one behind the last."""


def parts_of(tag: str) -> tuple[str, str]:
    """(prefix, type) of an entity tag, in the letters of IOBES; ("O", "") outside.

    Raises:
        ValueError: it is no entity tag.
    """
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, hyphen, kind = tag.partition("-")
    if not hyphen or not kind or len(prefix) != 1 or prefix not in _PREFIXES:
        raise ValueError(f"{tag!r} is no entity tag: O, or one of B I E S (L U) with a hyphen and a type")
    return {"L": "E", "U": "S"}.get(prefix, prefix), kind


def are_entities(tags: Iterable[str]) -> bool:
    """Whether all of them are entity tags, and at least one names an entity."""
    found = False
    for tag in tags:
        try:
            found |= parts_of(tag)[0] != OUTSIDE
        except ValueError:
            return False
    return found


def entities_of(tags: Sequence[str], *, strict: bool = False) -> list[Entity]:
    """Entities that a sentence's tags spell, from left to right.

    Args:
        tags: of any scheme; `strict` reads BIO only.
        strict: see the module.

    Raises:
        ValueError: one is no entity tag.
    """
    found: list[Entity] = []
    begun: tuple[str, int] | None = None
    prefix, kind = OUTSIDE, ""
    for index, tag in enumerate((*tags, OUTSIDE)):
        before, of, (prefix, kind) = prefix, kind, parts_of(tag)
        if strict:
            ends, begins = prefix != "I" or of != kind, prefix == "B"
        else:
            ends = before in "ES" or (before in "BI" and prefix in "BSO") or (before != OUTSIDE and of != kind)
            begins = prefix in "BS" or (before in "ESO" and prefix in "EI") or (prefix != OUTSIDE and of != kind)
        if begun is not None and ends:
            found.append((begun[0], begun[1], index))
            begun = None
        if begins:
            begun = kind, index
    return found


def scheme_of(sentences: Iterable[Sequence[str]]) -> str:
    """ "IOBES" where a tag has a prefix of that scheme, "IOB1" where an entity begins with I, else "BIO"."""
    scheme = "BIO"
    for tags in sentences:
        before, of = OUTSIDE, ""
        for tag in tags:
            prefix, kind = parts_of(tag)
            if prefix in "ES":
                return "IOBES"
            if prefix == "I" and (before == OUTSIDE or of != kind):
                scheme = "IOB1"
            before, of = prefix, kind
    return scheme


def written(entities: Iterable[Entity], count: int, scheme: str = "BIO") -> list[str]:
    """Tags of a sentence of `count` words, from entities that do not overlap; `scheme`: BIO, IOB1 or IOBES."""
    tags = [OUTSIDE] * count
    behind, of = 0, ""
    for kind, first, last in sorted(entities, key=lambda entity: entity[1]):
        for index in range(first, last):
            prefix = "B" if index == first else "I"
            if scheme == "IOBES":
                prefix = "S" if last - first == 1 else "E" if index == last - 1 else prefix
            elif scheme == "IOB1":
                prefix = "B" if index == first and first == behind and of == kind and behind else "I"
            tags[index] = f"{prefix}-{kind}"
        behind, of = last, kind
    return tags


def as_bio(tags: Sequence[str]) -> list[str]:
    """Tags of any scheme as BIO."""
    return written(entities_of(tags), len(tags))


def bio_names(types: Iterable[str]) -> tuple[str, ...]:
    """All BIO tags of these types: O, then B and I of each."""
    return (OUTSIDE, *(f"{prefix}-{kind}" for kind in sorted(set(types)) for prefix in "BI"))


@dataclass(frozen=True)
class Tags:
    """Of a sentence's words.

    Attributes:
        ids: numbers of the tags, `UNTAGGED` where one is not known to the task.
    """

    ids: tuple[int, ...]


def words_of(text: str) -> list[str]:
    """The words of a row's text, which single spaces part."""
    return text.split(" ")
