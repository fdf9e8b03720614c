"""Words that users should not read, and what to write instead: for documents, help, messages and log lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

INSTEAD: Mapping[str, str] = {
    r"judg\w*": "evaluate, results, evaluated",
    r"(?<!ground[ -])truths?": "ground truth",
    r"(?:right|wrong) (?:detections?|boxes|ones)|(?:detections?|boxes) (?:is|are|that (?:is|are)) (?:right|wrong)": (
        "true positive, false positive"
    ),
    r"claim(?:s|ed|ing)?": "candidate match, matches",
    r"draws": "samples",
    r"drawn (?:anew|alike|evenly|uniformly|often|more|less|at random)": "sampled",
    r"presences?": "image-class pairs",
    r"dials?": "searchable setting",
    r"the other processes|works? along": "other ranks, rank",
    r"doubles|thin(?:s|ned|ning)? out": "duplicates, suppress",
    r"shares? of": "fraction of",
    r"faults?|faulty|mend(?:s|ed|ing)?": "error, fix",
    r"pictures?": "figure, image",
    r"(?<!\.)says?|said|saying|(?<!\.)tells?|told|telling": "print, report, reported",
    r"learnt": "trained, learned",
    r"(?:go|goes|going|gone|went) on": "resume, continue",
    r"(?<!in )(?<!takes )places?": "path, index, position",
}
"""Pattern of whole words, in any case -> what to write instead."""

NOT_WORDS = re.compile(r"``[^`]*``|`[^`\n]*`|</?\w[^>]*>|\]\([^)]*\)|https?://\S+|(?:#+ )?\$?RETINAFLOW_\w+")
"""Names of code, targets of links and addresses, which stand as they are."""

_UNWANTED = re.compile("|".join(rf"(?P<w{n}>\b(?:{words})\b)" for n, words in enumerate(INSTEAD)), re.IGNORECASE)
_ADVICE = tuple(INSTEAD.values())


def unwanted_words(text: str, *, what: str = "line", quotes: bool = False) -> Iterator[str]:
    """``line 3: 'judged' (write: evaluate, results, evaluated)`` for every unwanted word of a text.

    ``what`` names what is counted. With ``quotes`` passages in double quotes are left out too.
    """
    for number, line in enumerate(text.splitlines(), 1):
        plain = NOT_WORDS.sub(" ", re.sub(r'"[^"\n]*"', " ", line) if quotes else line)
        for hit in _UNWANTED.finditer(plain):
            advice = _ADVICE[int(str(hit.lastgroup)[1:])]
            yield f"{what} {number}: {hit.group()!r} (write: {advice})"
