"""Scenes: generated pictures of shapes whose content is known exactly, in words and in pixels.

All but the checker needs numpy and Pillow only; the checker loads torch when it is first used.
"""

from typing import TYPE_CHECKING, Any

from .drawing import render
from .edits import (
    EDITS,
    alike,
    carried_out,
    edit_holds,
    edit_kind,
    edits,
    laid_out,
    located,
    misdirected,
    read_out,
)
from .hindsight import nearest, plain
from .language import describe, express, prompt, task_prompt
from .meaning import VOCABULARY, Spec, complete, not_there, parse, satisfies
from .mending import mend, repaint
from .questions import (
    QUESTION_TYPES,
    Question,
    absent_questions,
    implied_questions,
    normalize_answer,
    open_questions,
    questions,
    text_dialogue,
    yes_no_pairs,
)
from .references import refer
from .sampling import TASKS, fits, sample_placed, sample_scene, upright
from .unknown import UNKNOWN_ANSWER, unknown_question
from .world import (
    ARRAY_LENGTH,
    RELATIONS,
    SIZES,
    SPLITS,
    WORLDS,
    Object,
    Scene,
    World,
    from_array,
    get_world,
    held_out_pair,
    held_out_triple,
    is_held_out,
    main_relation,
    relation_holds,
    to_array,
)

if TYPE_CHECKING:
    from .checker import UNKNOWN, check, look

__all__ = [
    "ARRAY_LENGTH",
    "EDITS",
    "QUESTION_TYPES",
    "RELATIONS",
    "SIZES",
    "SPLITS",
    "TASKS",
    "UNKNOWN",
    "UNKNOWN_ANSWER",
    "VOCABULARY",
    "WORLDS",
    "Object",
    "Question",
    "Scene",
    "Spec",
    "World",
    "absent_questions",
    "alike",
    "carried_out",
    "check",
    "complete",
    "describe",
    "edit_holds",
    "edit_kind",
    "edits",
    "express",
    "fits",
    "from_array",
    "get_world",
    "held_out_pair",
    "held_out_triple",
    "implied_questions",
    "is_held_out",
    "laid_out",
    "located",
    "look",
    "main_relation",
    "mend",
    "misdirected",
    "nearest",
    "normalize_answer",
    "not_there",
    "open_questions",
    "parse",
    "plain",
    "prompt",
    "questions",
    "read_out",
    "refer",
    "relation_holds",
    "render",
    "repaint",
    "sample_placed",
    "sample_scene",
    "satisfies",
    "task_prompt",
    "text_dialogue",
    "to_array",
    "unknown_question",
    "upright",
    "yes_no_pairs",
]


def __getattr__(name: str) -> Any:
    if name in ("UNKNOWN", "check", "look"):  # torch is loaded when a picture is looked at
        from . import checker

        return getattr(checker, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
