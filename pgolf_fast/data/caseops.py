"""CaseOps (PR 1729): ASCII capitals as operators before lower-case words, exactly invertible on text.

A tokenizer then has one piece for "the", "The" and "THE". Only case is lossless: SentencePiece normalizes the
encoded text like any other.
"""

import re

TITLE, ALL_CAPS, CAP_NEXT, ESCAPE = OPERATORS = "\ue001\ue002\ue003\ue004"

_OPERATOR = re.compile(f"([{OPERATORS}])")
_CAPITAL = re.compile("[A-Z]")
_FROM_CAPITAL = re.compile("[A-Z][A-Za-z]*")  # the rest of a word, from its first capital on
# In this order: each alternative but the last is a valid use of an operator.
_USE = re.compile(
    f"{ESCAPE}(?P<escaped>[{OPERATORS}])|{CAP_NEXT}(?P<next>[A-Za-z])|(?<![A-Za-z])"
    f"(?:{TITLE}(?P<title>[A-Za-z])|{ALL_CAPS}(?P<caps>[A-Za-z]+))|(?P<bad>[{OPERATORS}])"
)
_NAMES = dict(zip(OPERATORS, ("TITLE", "ALLCAPS", "CAPNEXT", "ESC"), strict=True))


def encode(text: str) -> str:
    """Return `text` with the capitals of each run of ASCII letters as operators; operators in it are escaped.

    "The NASA iPhone McX" becomes TITLE the ALLCAPS nasa i CAPNEXT phone TITLE mc CAPNEXT x.
    """
    return _FROM_CAPITAL.sub(_lowered, _OPERATOR.sub(rf"{ESCAPE}\1", text))


def decode(text: str, *, strict: bool = True) -> str:
    """Return the text that `encode` turned into `text`.

    Raises `ValueError` with the position of an operator that `encode` does not write: TITLE or ALLCAPS inside
    a word, one that no ASCII letter follows, or ESC before anything but an operator. Unless `strict`, those
    are left out, as for sampled text.
    """

    def plain(match: re.Match[str]) -> str:
        kind = match.lastgroup
        if kind == "bad" and strict:
            raise ValueError(f"position {match.start()}: {_fault(text, match.start())}")
        return "" if kind == "bad" else match[str(kind)].upper()

    return _USE.sub(plain, text)


def _lowered(match: re.Match[str]) -> str:
    word, start = match[0], match.start()
    if start and "a" <= match.string[start - 1] <= "z":  # within a word
        return _CAPITAL.sub(_next, word)
    lower = word.lower()
    if word[1:] == lower[1:]:
        return TITLE + lower
    return ALL_CAPS + lower if word.isupper() else TITLE + lower[0] + _CAPITAL.sub(_next, word[1:])


def _next(capital: re.Match[str]) -> str:
    return CAP_NEXT + capital[0].lower()


def _fault(text: str, at: int) -> str:
    name, after = _NAMES[text[at]], text[at + 1 : at + 2]
    if not after:
        return f"{name} ends the text"
    if text[at] == ESCAPE:
        return f"ESC before {after!r}, which is no operator"
    if not re.match("[A-Za-z]", after):
        return f"{name} before {_NAMES.get(after, repr(after))} instead of an ASCII letter"
    return f"{name} inside a word"
