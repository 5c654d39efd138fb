"""People's words as a model of plain sentences has learned them.

The bundled model has read lower case alone, and every question with its mark: "What color is the
star" means to it what "what color is the star?" does once this has been through. Only a model whose
`sampling` says "plain" has its input changed.
"""

import re

from unimm.data.scenes import VOCABULARY, WORLDS

QUESTION = re.compile(r"(is|are|was|were|do|does|did|can|could|what|which|where|how|who|why|when) ")
POLITE = re.compile(
    r"((and|now|then|next|please|ok|okay|hi|hello|hey|i'd|i|we|would|could|can|will|you|like|want"
    r"|need|to|see|have|get|give|let)\b,? ?|me (?!a picture of))+"
)
MAKE = re.compile(r"(sketch|create|render|design|produce|generate|make) (me )?")


OLD = {"were": "are", "was": "is", "colour": "color", "colours": "colors", "grey": "gray"}
DESCRIBE = re.compile(
    r"(describe|caption) (it|this|that|(the|this) (image|photo))"
    r"|what (do|can) you see( there| here| in (it|(the|this) (picture|image)))?\?"
    r"|what is (this|that|it|in (it|(the|this) (picture|image)))\?"
)
PICTURE = re.compile(r"\b(?:the )?(first|second|third|last) (?:picture|image|one)\b")
SEVERAL = re.compile(r"\b(both|pictures|which picture|where are there more)\b")
KNOWN = VOCABULARY | set(  # the words of questions, instructions and small talk
    "add as at away background backgrounds be been bigger both but caption change color colors "
    "count delete describe design did do does each exactly first get has have hello hey hi higher "
    "how if image images just larger last least left let look lower many more most must need "
    "number object objects ok okay only or other pictures plain put remove render replace right "
    "say second see set shape shapes side size sizes sketch smaller some somewhere somewhat still "
    "take than that them then these they thing things third those too top turn under use very we "
    "well what where which who will would yes no not now next after again another i'd me new one "
    "ones please so us use used its on off by for from instead fewer into against".split()
)


def plain(text: str) -> str:
    """In lower case, and with the mark of a question where it is one."""
    words = re.sub(r"\s+", " ", text.lower()).strip()
    words = re.sub(r"[a-z]+", lambda found: OLD.get(found[0], found[0]), words)
    words = re.sub(r"\b(\w+) (?:things|shapes)\b", _objects, words)
    words = re.sub(r"[ .!?]*$", "?", words, count=1) if QUESTION.match(words) else words
    return "describe the picture" if DESCRIBE.fullmatch(words) else words


def _objects(found: re.Match) -> str:
    """ "red things" are "red objects"."""
    return f"{found[1]} objects" if found[1] in WORLDS["scenes"].colors else found[0]


def unknown_words(text: str) -> list[str]:
    """What a text says that no text of Scenes does: "cat" of "draw a cat and a red star"."""
    words = re.findall(r"[^\s.,;:!?()\"'-]+", plain(text).replace("i'd", "i").replace("'s", ""))
    return [word for word in words if word not in KNOWN]


def no_ground(wish: str) -> str | None:
    """The colour that an instruction wants for the background, if there is no such background."""
    grounds = {b for world in WORLDS.values() for b in world.backgrounds}
    colors = "|".join(sorted({c for world in WORLDS.values() for c in world.colors} - grounds))
    found = re.search(rf"\b(?:background(?: to)? ({colors})|({colors}) background)\b", wish)
    return (found[1] or found[2]) if found else None


def of_which(question: str, count: int) -> tuple[int | None, str]:
    """Which of `count` pictures a plain question is about (the last, if it does not say), and the
    question about that one alone; None where it is about more than one."""
    if count > 1 and SEVERAL.search(question):
        return None, question
    which = count - 1
    if found := PICTURE.search(question):
        which = {"first": 0, "second": 1, "third": 2, "last": count - 1}[found[1]]
        question = re.sub(rf"^in {re.escape(found[0])}[, ]+", "", question)
        question = plain(PICTURE.sub("the picture", question))
    return (which if which < count else None), question


def plain_wish(text: str) -> str:
    """What is wished for, without the polite words before it: "please make the star red"."""
    words = plain(text).rstrip(" .,;:!?")
    words = words[match.end() :] if (match := POLITE.match(words)) else words
    words = re.sub(r"^(make .*) (?:bigger|larger)$", r"\1 large", words)
    return re.sub(r"^(make .*) smaller$", r"\1 small", words)


def plain_prompt(text: str) -> str:
    """A wish for a new picture: "Could you create a red star?" is "draw a red star"."""
    words = re.sub(r"\ban? (image|drawing|photo|painting) of\b", "a picture of", plain_wish(text))
    if not (match := MAKE.match(words)):
        return words
    rest = words[match.end() :]
    return rest if rest.startswith("a picture of") else f"draw {rest}"
