"""What a run of a unified model shows of itself on the way: pictures, answers, held-out losses."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimm.checkpoints.adapters import merged_copy
from unimm.config import Run
from unimm.data.processor import Message, Processor, Sample, checked, draws, to_picture, user
from unimm.data.stores import VALIDATION
from unimm.inference.engine import Engine, Request
from unimm.inference.sampling import Settings
from unimm.model.unified import KINDS, TEXT, UnifiedModel

HeldOut = dict[str, list[tuple[list[Message], Sample]]]  # by source
LONGEST = 48  # text tokens of an answer in a preview


def show(
    run: Run,
    model: UnifiedModel,
    processor: Processor,
    rows: HeldOut,
    folder: Path,
    step: int,
) -> dict[str, float]:
    """Draw and answer what is fixed for the whole run; returns metrics.

    Drawn are the texts of `run.options["prompts"]` and the prompts of the first
    `run.options["previews"]` conversations held out that end in a picture; answered, greedily, are
    as many held-out questions. preview-STEP.png has the pictures, eight a row, and preview-STEP.txt
    says what each is of, and the answers beside those that the data has.
    """
    turns = list(fixed_turns(rows, processor, int(run.options.get("previews", 0))))
    prompts = [[user(text)] for text in run.options.get("prompts") or ()]
    prompts += [talk for talk, answer in turns if answer is None]
    lines, found = [], {}
    if prompts or turns:
        model = merged_copy(model)
    if prompts and processor.image_tokenizer is not None:
        codes = draw_codes(model, processor, prompts, run.options.get("guidance", 2.0))
        save_grid(processor.pixels(codes), folder / f"preview-{step:06d}.png", columns=8)
        found["preview_different_codes"] = float(len({code for one in codes for code in one}))
        lines += [f"drawn {k + 1}: {words_of(talk)}" for k, talk in enumerate(prompts)]
    asked = [(talk, answer) for talk, answer in turns if answer is not None]
    if asked:
        texts = answer_texts(model, processor, [talk for talk, _ in asked])
        said = [" ".join(text.split()) for text in texts]
        right = [text == expected for text, (_, expected) in zip(said, asked, strict=True)]
        found["preview_answers_exact"] = sum(right) / len(asked)
        for text, (talk, expected) in zip(said, asked, strict=True):
            lines.append(f"asked: {words_of(talk)} | answered: {text} | in the data: {expected}")
    if lines:
        path = folder / f"preview-{step:06d}.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def held_out_rows(run: Run, processor: Processor, most: int = 256) -> HeldOut:
    """Up to `most` conversations that each source holds out (its `kept` rows); those that cannot
    be read are left out."""
    found: HeldOut = {}
    for name, source in run.data.items():
        with suppress(ValueError, OSError):  # no reason to stop a run
            rows = source.make(run, **source.options)
            for i in range(min(most, len(getattr(rows, "kept", ())))):
                with suppress(ValueError, OSError):
                    messages = rows[VALIDATION + i]["messages"]
                    found.setdefault(name, []).append((messages, processor.encode(messages)))
    return found


def fixed_turns(
    rows: HeldOut, processor: Processor, most: int
) -> Iterator[tuple[list[Message], str | None]]:
    """The first held-out conversations up to the assistant's first turn, with what it says there
    (None where it draws): at most `most` of each of the two."""
    left = {"drawn": most, "said": most}
    for messages, _ in (row for of_source in rows.values() for row in of_source):
        turns = [checked(message) for message in messages]
        end = next((k for k, (role, _) in enumerate(turns) if role == "assistant"), 0)
        answer = turns[end]
        kind = "drawn" if draws(*answer) else "said"
        if end and left[kind]:
            left[kind] -= 1
            said = " ".join(" ".join(part.get("text", "") for part in answer[1]).split())
            yield messages[:end], None if kind == "drawn" else said


def held_out_nats(
    run: Run, model: UnifiedModel, processor: Processor, rows: HeldOut
) -> dict[str, float]:
    """Nats a scored slot on what the sources hold out, by source and kind.

    Text counts in samples that say something: the two slots around a drawn picture, which are known
    beforehand, would else pass for words. (Emu3 says a picture's size before it, in words.)
    """
    found = {}
    for name, of_source in rows.items():
        sums = {kind: [0.0, 0.0] for kind in KINDS}
        samples = [sample for _, sample in of_source]
        few = -(-run.batch_size // run.accumulate)  # as in training, so that it fits
        for k in range(0, len(samples), few):
            batch = processor.collate(samples[k : k + few])
            output = model(batch.to(model.decoder.norm.weight.device))
            for kind, value in KINDS.items():
                for row, sample in enumerate(samples[k : k + few]):
                    if kind == "code" or says_words(sample, processor):
                        sums[kind][0] += float(output.row_nats[kind][row])
                        sums[kind][1] += float(sample.score[sample.kind == value].sum())
        for kind, (total, count) in sums.items():
            if count:
                found[f"{name}_held_out_{kind}_nats"] = total / count
    return found


def says_words(sample: Sample, processor: Processor) -> bool:
    """Whether some word is to be predicted."""
    said = sample.ids[(sample.kind == TEXT) & (sample.score > 0)]
    return bool(processor.is_word(said).any())


def draw(
    model: UnifiedModel, processor: Processor, prompts: list[str], guidance: float, seed: int = 0
) -> Tensor:
    """One picture a prompt, (N, 3, H, W) in [-1, 1]."""
    talks = [[user(prompt)] for prompt in prompts]
    return processor.pixels(draw_codes(model, processor, talks, guidance, seed))


def draw_codes(
    model: UnifiedModel,
    processor: Processor,
    talks: list[list[Message]],
    guidance: float,
    seed: int = 0,
) -> list[list[int]]:
    """The codes of the picture that follows each conversation."""
    requests = [
        Request(processor.encode(talk, answer="image"), "image", seed + k)
        for k, talk in enumerate(talks)
    ]
    answers = engine_of(model, processor).run(requests, Settings(guidance=guidance))
    return [list(map(int, answer.codes)) for answer in answers]


def answer_texts(
    model: UnifiedModel, processor: Processor, talks: list[list[Message]]
) -> list[str]:
    """The likeliest words after each conversation."""
    requests = [Request(processor.encode(talk, answer="text"), "text") for talk in talks]
    answers = engine_of(model, processor).run(requests, Settings(max_text=LONGEST))
    return [processor.text(answer.text) for answer in answers]


def engine_of(model: UnifiedModel, processor: Processor) -> Engine:
    return Engine(model, processor)


def words_of(talk: list[Message]) -> str:
    """What is said in a conversation; a picture is "[picture]"."""
    parts: list[Any] = []
    for message in talk:
        content = message["content"]
        parts += [{"text": content}] if isinstance(content, str) else content
    return " ".join(" ".join(part.get("text", "[picture]").split()) for part in parts)


def save_grid(pictures: Tensor, path: Path, columns: int) -> None:
    """Pictures (N, 3, H, W) in [-1, 1] as one PNG with white lines between them."""
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + 2) + 2, columns * (width + 2) + 2)
    for k, picture in enumerate(pictures.float().cpu()):
        top, left = 2 + k // columns * (height + 2), 2 + k % columns * (width + 2)
        sheet[:, top : top + height, left : left + width] = picture
    to_picture(sheet).save(path)
