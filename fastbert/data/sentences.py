"""Sentences of plain text, by rules that need no model and are the same on every machine."""

from __future__ import annotations

import re
from itertools import pairwise

# bumped whenever the rules below change, so that shards made with older rules are refused
RULES_VERSION = 1

# end punctuation and closers, then a space and the first letter or digit of what follows; or an ideographic full stop
_BOUNDARY = re.compile(
    r"""([.!?…]+["'”’»)\]]*)\s+(?=["'“‘«(\[¿¡]*([^\W_]))|[。！？]+[」』”’）]*(?=.)"""
)
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
# never the end of a sentence, whatever follows
_TITLES = re.compile(
    "mr|mrs|ms|dr|prof|rev|hon|gen|gov|sen|rep|pres|capt|cpt|col|lt|sgt|maj|adm|st|ft|mt|messrs|mme|mlle"
    "|vs|cf|viz|eg|ie|approx|dept"
)
# not the end of a sentence before a digit: No. 5, Art. 2, Dec. 7
_NUMBERED = re.compile(
    "nos?|vols?|pp?|arts?|secs?|ch|figs?|eq|par|ca|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec"
)


def split_sentences(text: str) -> list[str]:
    """Cut one paragraph into sentences; joined with spaces they give the paragraph again (whitespace apart).

    A sentence ends at `.`, `!`, `?` or `…` (with closing quotes and brackets) before whitespace and a letter that is
    not lower case, or a digit; also at an ideographic full stop. Titles (Mr., Gen.), initials (J., U.S.), numbering
    (No. 5, Dec. 7) and a number that opens the paragraph (1. First ...) don't end one.
    """
    cuts = [0]
    for match in _BOUNDARY.finditer(text):
        if match[1] is None or _ends(text, match):
            cuts.append(match.end())
    cuts.append(len(text))
    parts = (text[start:end].strip() for start, end in pairwise(cuts))
    return [part for part in parts if part]


def _ends(text: str, match: re.Match[str]) -> bool:
    """Whether the end punctuation found before whitespace ends a sentence."""
    following = match[2]
    if following.islower():
        return False
    if match[1] != ".":
        return True
    start = text.rfind(" ", 0, match.start()) + 1
    word = text[start : match.start()].lstrip("\"'“‘«([")
    if word.isdigit():
        return start > 0
    # at "you and I. Now" a sentence ends; that is far more frequent than I as an initial
    if _INITIALS.fullmatch(word) and word != "I":
        return False
    lower = word.lower()
    if following.isdigit() and _NUMBERED.fullmatch(lower):
        return False
    return _TITLES.fullmatch(lower) is None
