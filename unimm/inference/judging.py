"""The model as its own judge: does what it sees in a picture agree with what was asked for?"""

from collections.abc import Sequence
from typing import Any

import torch

from unimm.data.processor import Processor, assistant, user
from unimm.data.scenes import alike, carried_out, implied_questions, parse, read_out, satisfies
from unimm.model.unified import UnifiedModel

BATCH = 32


@torch.inference_mode()
def agreement(
    model: UnifiedModel, processor: Processor, pictures: Sequence[Any], prompts: Sequence[str]
) -> list[float]:
    """How well each picture fits its prompt by the model's own understanding, 0 at best.

    The questions that the prompt implies ("how many stars are there?") are put to the model one
    after the other, and the log-probabilities of the answers that the prompt demands are summed.
    A prompt outside the language of Scenes becomes one question.
    """
    scores: list[float] = []
    device = model.decoder.norm.weight.device
    for k in range(0, len(pictures), BATCH):
        samples = []
        for picture, prompt in zip(pictures[k : k + BATCH], prompts[k : k + BATCH], strict=True):
            asked = wanted(prompt)
            talk = [user(picture, asked[0][0]), assistant(asked[0][1])]
            for question, answer in asked[1:]:
                talk += [user(question), assistant(answer)]
            samples.append(processor.encode(talk))
        scores += model(processor.collate(samples).to(device)).log_probs.tolist()
    return scores


def wanted(prompt: str) -> list[tuple[str, str]]:
    """Questions about a picture of `prompt`, with the answers that it should get."""
    spec = parse(prompt)
    if spec is None:
        return [(f"does the picture show {prompt}?", "yes")]
    return implied_questions(spec)


def as_asked(prompt: str, seen: str) -> bool:
    """Whether a picture read out in words ("a small red star (2,2) on a white background") is what
    a prompt asks for; True where that cannot be told, as of a prompt outside Scenes."""
    spec, scene = parse(prompt), read_out(seen)
    return spec is None or (scene is not None and satisfies(scene, spec))


def untold(caption: str, seen: str) -> bool | None:
    """Whether a picture read out in words is not what a caption says; None where that is no whole
    description, with the background, or nothing was read out."""
    spec, scene = parse(caption), read_out(seen)
    if spec is None or spec.background is None or scene is None:
        return None
    return not satisfies(scene, spec)


def as_changed(before: str, instruction: str, after: str) -> bool:
    """Whether a picture read out before and after an instruction ("remove the small red star
    (2,2)") has that change and no other; True where that cannot be told."""
    old, new = read_out(before), read_out(after)
    wanted = carried_out(instruction, old) if old else None
    return wanted is None or (new is not None and alike(new, wanted))
