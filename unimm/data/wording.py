"""People's words as a model of plain sentences has learned them.

The bundled model has read lower case alone, and every question with its mark: "What color is the
star" means to it what "what color is the star?" does once this has been through. Only a model whose
`sampling` says "plain" has its input changed.
"""

import re

QUESTION = re.compile(r"(is|are|was|were|do|does|did|can|could|what|which|where|how|who|why|when) ")
POLITE = re.compile(
    r"((and|now|then|next|please|ok|okay|hi|hello|hey|i'd|i|we|would|could|can|will|you|like|want"
    r"|need|to|see|have|get|give|let)\b,? ?|me (?!a picture of))+"
)
MAKE = re.compile(r"(sketch|create|render|design|produce|generate|make) (me )?")


def plain(text: str) -> str:
    """In lower case, and with the mark of a question where it is one."""
    words = re.sub(r"\s+", " ", text.lower()).strip()
    return re.sub(r"[ .!?]*$", "?", words, count=1) if QUESTION.match(words) else words


def plain_wish(text: str) -> str:
    """What is wished for, without the polite words before it: "please make the star red"."""
    words = plain(text).rstrip(" .,;:!?")
    return words[match.end() :] if (match := POLITE.match(words)) else words


def plain_prompt(text: str) -> str:
    """A wish for a new picture: "Could you create a red star?" is "draw a red star"."""
    words = re.sub(r"\ban? (image|drawing|photo|painting) of\b", "a picture of", plain_wish(text))
    if not (match := MAKE.match(words)):
        return words
    rest = words[match.end() :]
    return rest if rest.startswith("a picture of") else f"draw {rest}"
