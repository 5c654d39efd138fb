"""`UniMM`: what a user holds. One model that draws, captions, answers, edits and chats."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unimm.checkpoints.load import describe_model, load_model
from unimm.checkpoints.native import BUNDLED, save_model
from unimm.data.images import open_image
from unimm.data.places import LAYOUT, LOOK, WHERE, around, drawing_steps
from unimm.data.processor import (
    BOTH,
    MARKED,
    Message,
    Processor,
    TooLong,
    assistant,
    checked,
    to_picture,
    user,
)
from unimm.data.scenes import UNKNOWN_ANSWER, not_there, parse, read_out
from unimm.data.wording import (
    QUESTION,
    no_ground,
    of_which,
    plain,
    plain_prompt,
    plain_wish,
    unknown_words,
)
from unimm.inference.engine import Answer, Engine, Request
from unimm.inference.judging import agreement, as_asked, as_changed, untold
from unimm.inference.kernel import signature
from unimm.inference.sampling import Settings
from unimm.inference.stepper import prepare
from unimm.model.unified import CODE, UnifiedModel

log = logging.getLogger(__name__)

BATCH = 16  # pictures drawn side by side
AGAIN = 10_007  # from the seed of one try at a picture to that of the next
ROOM = 8  # slots beside the codes of a picture in an answer
Sampling = tuple[float | None, float | None, int, float]  # guidance, temperature, top_k, top_p
NEW = re.compile(  # how what asks for a new picture begins
    r"(draw|show|sketch|create|render|design|produce|generate|make (me )?an?|a picture of) "
)


class UniMM:
    """A unified model with its processor, ready to use.

    Pictures come as paths, PIL images or uint8 arrays (H, W, 3), and go as PIL images. Wrong
    input raises ValueError with a sentence that says what to do.
    """

    def __init__(
        self, model: UnifiedModel, processor: Processor, sampling: dict[str, Any] | None = None
    ):
        self.model, self.processor = model.eval(), processor
        self.sampling = sampling or {}
        self.folder: Path | None = None  # where a diffusion decoder may lie
        self._diffusion: Any = None  # the pipeline of that decoder, once it is asked for
        self._plain_pictures: tuple[Any, dict[str, list[int]]] = None, {}  # of which weights
        self.engine = Engine(model, processor)

    @classmethod
    def from_pretrained(
        cls, source: str | Path | None = None, device: str = "auto", dtype: str = "float32"
    ) -> "UniMM":
        """Load a model folder or a Hub id (`name/model[@revision]`); None is the bundled model.

        The format is recognised: native, Hugging Face Janus, DeepSeek Janus, Hugging Face Emu3.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "mps". dtype: "float32",
        "bfloat16", "float16", "auto" for that of the files, or "int8" for the decoder's linear
        layers (unimm.model.int8), the rest as in the files; the image tokenizer stays in float32.

        Without a compiler for the kernel a CPU's linear layers are packed for oneDNN or FBGEMM, and
        cannot learn (unimm.inference.packed); what `load_model` gives can. FBGEMM gets bfloat16
        where the processor does not multiply that, and float16: the rest is float32 then.
        """
        target = pick_device(device)
        place = BUNDLED if source is None else source
        model = cls(*load_model(place, dtype, target))
        prepare(model.model)
        model.folder = Path(place)
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that `from_pretrained` loads."""
        save_model(folder, self.model, self.processor, self.sampling, dtype)

    def generate(
        self,
        prompt: str | Sequence[str],
        n: int = 1,
        *,
        best_of: int = 1,
        decoder: str = "codes",
        steps: int = 30,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Any:
        """Draw `n` pictures of each prompt; picture k of the call uses seed + k.

        `best_of`: so many are drawn for each picture (seed + k * best_of and on), and the model
        itself chooses the one that fits the prompt best by what it sees there. `decoder`: "codes",
        or "diffusion" where the model's folder holds one (train/diffusion.py), in `steps` steps of
        Euler; of the settings of sampling it uses guidance and seed alone.
        Returns one image for one prompt with n=1, else a list (all of the first prompt first).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if n < 1 or best_of < 1 or not prompts:
            raise ValueError(
                "ask for at least one picture (n >= 1, best_of >= 1) of at least one prompt"
            )
        asked = [self._plain(checked_text(p, "prompt"), plain_prompt) for p in prompts]
        self._warn(*prompts)
        texts = [words for words in asked for _ in range(n * best_of)]
        settings = self._settings(guidance, temperature, top_k, top_p)
        if decoder == "diffusion":
            images = self._diffuse(texts, settings.guidance, steps, seed)
        elif decoder == "codes":
            images = self.pictures(
                self.draw_codes([[user(text)] for text in texts], settings, seed)
            )
        else:
            raise ValueError(f"decoder is 'codes' or 'diffusion', not {decoder!r}")
        if best_of > 1:
            scores = agreement(self.model, self.processor, images, texts)
            starts = range(0, len(images), best_of)
            images = [images[max(range(k, k + best_of), key=scores.__getitem__)] for k in starts]
        return images[0] if isinstance(prompt, str) and n == 1 else images

    def generate_stream(
        self,
        prompt: str,
        every: int = 8,
        *,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[Image.Image]:
        """The picture as it comes, after every `every` codes; the last one is `generate`'s.

        One of many things, which is drawn thing by thing, comes after each of these.
        """
        if every < 1:
            raise ValueError("every must be 1 or more")
        words = self._plain(checked_text(prompt, "prompt"), plain_prompt)
        self._warn(prompt)
        settings = self._settings(guidance, temperature, top_k, top_p)
        if steps := self._steps([words], [seed])[0]:
            for pieces in self._piecewise([steps], settings, [seed]):
                codes = pieces[0]
                yield self.pictures([codes])[0]
        else:
            request = self._requests([[user(words)]], "image", [seed])
            shown = 0
            for answer in self.engine.stream(request, settings):
                codes = answer[0].codes
                while shown + every <= len(codes):
                    shown += every
                    yield self._partial(codes[:shown])
            if shown < len(codes):
                yield self._partial(codes)
        (better,) = self._looked_over([[user(words)]], [codes], settings, [seed])
        if better != codes:
            yield self.pictures([better])[0]

    def caption(self, image: Any) -> str:
        """What is in the picture, in words."""
        return self.ask(image, "describe the picture")

    def ask(self, image: Any, question: str) -> str:
        """The answer to a question about the picture."""
        return self.ask_all([(image, question)])[0]

    def ask_all(self, pairs: Sequence[tuple[Any, str]], tries: int | None = None) -> list[str]:
        """Many (picture, question) pairs at once; the same answers as one by one.

        A model that has learned to ("look_first" in its `sampling`; `scenes_said`) first says of
        each picture what is where, and then answers from these words alone. A description that is
        not true of them is said again, `tries` times in all (None: "tries" in its `sampling`).
        """
        opened = {id(image): open_image(image) for image, _ in pairs}  # one picture, many questions
        asked = [(id(i), self._plain(checked_text(q, "question"), plain)) for i, q in pairs]
        looks = dict(zip(opened, self._look_at([*opened.values()]), strict=False))
        talks = [
            [user(f"{looks[k]}. {words}") if looks and words != LOOK else user(opened[k], words)]
            for k, words in asked
        ]
        answers = self._texts(talks, Settings(), [0] * len(talks))
        untrue = [k for k, (i, _) in enumerate(asked) if looks and untold(answers[k], looks[i])]
        settings = Settings(text_temperature=self.sampling.get("try_temperature", 0.0))
        for again in range(1, self.sampling.get("tries", 1) if tries is None else tries):
            if not untrue:
                break
            told = self._texts([talks[k] for k in untrue], settings, [again] * len(untrue))
            for k, words in zip(untrue, told, strict=True):
                if untold(words, looks[asked[k][0]]) is False:
                    answers[k] = words
            untrue = [k for k in untrue if untold(answers[k], looks[asked[k][0]])]
        foreign = [bool(self.unknown(question)) for _, question in pairs]
        return [UNKNOWN_ANSWER if f else a for f, a in zip(foreign, answers, strict=True)]

    def unknown(self, text: str) -> list[str]:
        """Words of which a model of Scenes alone has learned nothing: "cat" of "draw a cat".

        Where a question has one, `ask` answers that it knows simple scenes only, as `chat` does
        to whatever has one. Of other models: [].
        """
        return unknown_words(text) if self._simple else []

    def edit(
        self,
        image: Any,
        instruction: str,
        *,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Image.Image:
        """The picture with the change made."""
        settings = self._settings(guidance, temperature, top_k, top_p, kind="edit_")
        self._warn(checked_text(instruction, "instruction"))
        return self.pictures(self.draw_codes(self.edits([(image, instruction)]), settings, seed))[0]

    def edits(self, pairs: Sequence[tuple[Any, str]]) -> list[list[Message]]:
        """The conversations that `edit` continues, of (picture, instruction) pairs.

        A model that has learned to ("edit_located" in its `sampling`; `scenes_located`) first says
        what is meant, where it is and what becomes of it: "make the small red circle (5,3) a large
        red circle". So what is named is found in words, and no code has to find it while it draws.
        What is around that place is then drawn anew, and the codes of all the rest are kept.
        Other models draw everything, by the instruction as it is.
        """
        images = [as_part(image) for image, _ in pairs]
        words = [self._plain(checked_text(said, "instruction"), plain_wish) for _, said in pairs]
        if not self.sampling.get("edit_located"):
            return [edit_messages(*pair) for pair in zip(images, words, strict=True)]
        asked = [[user(i["image"], WHERE + said)] for i, said in zip(images, words, strict=True)]
        for k, look in enumerate(self._look_at([i["image"] for i in images])):
            images[k]["seen"] = look
            asked[k] = [user(images[k]["image"], LOOK), assistant(look), user(WHERE + words[k])]
        answers = self._texts(asked, Settings(), [0] * len(asked))
        said = [new or old for new, old in zip(answers, words, strict=True)]
        grid = self.processor.grid
        return [edit_messages(i, w, around(w, grid)) for i, w in zip(images, said, strict=True)]

    def chat(
        self,
        messages: Sequence[Message],
        *,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Message]:
        """The conversation with the model's answer appended; it may hold drawn images.

        A drawn image carries its codes, so that a later turn sees just what was drawn. What is to
        be changed in an image that the user shows is said before it, as `edit` does. A model of
        plain sentences (`data.wording`) answers what asks for a picture as `generate` and `edit`
        do, whatever else was spoken of, and one of Scenes alone declines what is not (`unknown`).
        The oldest turns are left out of a conversation that is
        too long for the model, and would leave no room for a picture.
        """
        if not messages or messages[-1].get("role") != "user":
            raise ValueError("a chat ends with the user message that is to be answered")
        if not any(part.get("text", "image").strip() for part in checked(messages[-1])[1]):
            raise ValueError("the message is empty: say what you want")
        sampling: Sampling = (guidance, temperature, top_k, top_p)
        heard = [*answered(messages[:-1]), messages[-1]] if self._simple else messages
        talk = self._recent([self._plainly(message) for message in heard])
        requests, settings = self._requests([talk], "any", [seed]), self._settings(*sampling)
        if not self.sampling.get("plain"):
            return [*messages, self._message(self.engine.run(requests, settings)[0])]
        parts = [part for message in talk for part in checked(message)[1]]
        pictures = [part["image"] for part in parts if "image" in part]
        words = " ".join(part.get("text", "") for part in checked(talk[-1])[1]).strip()
        if words and self._simple:
            if sorry := self._declined(words, pictures):
                return [*messages, assistant(sorry)]
            if NEW.match(plain_prompt(words)) or parse(plain_prompt(words)):
                return [*messages, self._painted(talk, sampling, seed)]
        looks = bool(self.sampling.get("look_first"))
        for (answer,) in self.engine.stream(requests, settings):
            if answer.codes:  # it draws: what was asked for, from its first code
                return [*messages, self._painted(talk, sampling, seed)]
            if answer.text and looks and pictures and words:  # it speaks of a picture
                which, question = of_which(words, len(pictures))
                if which is not None:
                    return [*messages, assistant(self.ask(pictures[which], question))]
        said = self.processor.text(answer.text)
        if self._simple and (unknown_words(said) or said.startswith("i ")):
            return [*messages, assistant(UNKNOWN_ANSWER)]
        return [*messages, self._message(answer)]

    @property
    def _simple(self) -> bool:
        """Whether it has learned plain sentences about Scenes, and nothing else."""
        return bool(self.sampling.get("plain") and self.sampling.get("world"))

    def _warn(self, *texts: str) -> None:
        for words in filter(None, map(self.unknown, texts)):
            log.warning("this model knows simple scenes only, and not: %s", ", ".join(words))

    def _declined(self, words: str, pictures: Sequence[Any]) -> str:
        """What a model of Scenes alone answers to a message that it can do nothing with."""
        wish = plain_prompt(words)
        asks = bool(QUESTION.match(wish)) or wish == "describe the picture"
        if not wish or self.unknown(words) or (no_ground(wish) and not asks):
            return UNKNOWN_ANSWER
        if asks and not pictures:
            return "there is no picture"
        if asks or not pictures or NEW.match(wish) or parse(wish):
            return ""
        seen = read_out("".join(self._look_at([open_image(pictures[-1])])))
        missing = not_there(plain_wish(words), seen) if seen else None
        return f"there is no {missing}" if missing else ""

    def _look_at(self, images: Sequence[Any]) -> list[str]:
        """What is where in each picture, as the model sees it; nothing if it has not learned to."""
        if not self.sampling.get("look_first"):
            return []
        return self._texts([[user(i, LOOK)] for i in images], Settings(), [0] * len(images))

    def _plain(self, text: str, way: Callable[[str], str]) -> str:
        """The text, put plainly for a model that knows nothing else; as it is where that is all."""
        return (way(text) or text) if self.sampling.get("plain") else text

    def _plainly(self, message: Message) -> Message:
        """A message of the user, put plainly."""
        role, content = checked(message)
        if role != "user" or not self.sampling.get("plain"):
            return message
        put = [{**p, "text": plain(p["text"])} if p["type"] == "text" else p for p in content]
        return {**message, "content": put}

    def _recent(self, messages: list[Message]) -> list[Message]:
        """The last turns, as many as leave room for a picture; where none do, as many as fit."""
        codes = self.processor.codes_per_image if self.processor.image_tokenizer else 0
        fitting = []
        for start in (k for k, message in enumerate(messages) if message.get("role") == "user"):
            try:
                length = len(self.processor.encode(messages[start:], "text"))
            except TooLong:
                continue
            if length + codes + ROOM <= self.processor.max_length:
                return messages[start:]
            fitting.append(start)
        return messages[fitting[0] if fitting else -1 :]

    def _painted(self, messages: list[Message], sampling: Sampling, seed: int) -> Message:
        """The answer with what is to be drawn, for which all else that was said does not matter:
        a new picture, or the last one with a change."""
        parts = [part for message in messages for part in checked(message)[1]]
        pictures = [part for part in parts if "image" in part]
        said = [part["text"] for part in checked(messages[-1])[1] if part["type"] == "text"]
        words = " ".join(said)
        wish = plain_wish(words)
        if not pictures or NEW.match(wish) or parse(wish):
            prompt = checked_text(plain_prompt(words), "message")
            codes = self.draw_codes([[user(prompt)]], self._settings(*sampling), seed)
        else:
            talk = self.edits([(pictures[-1], checked_text(words, "message"))])
            codes = self.draw_codes(talk, self._settings(*sampling, "edit_"), seed)
        return self._message(Answer([(CODE, codes[0])]))

    def draw_codes(
        self,
        talks: Sequence[list[Message]],
        settings: Settings,
        seed: int,
        tries: int | None = None,
    ) -> list[list[int]]:
        """The codes of the pictures that answer conversations; picture k uses seed + k.

        Where one is a prompt alone, of many things, it is drawn thing by thing (`generate`). A
        model that looks first ("look_first" in its `sampling`) also looks at what it drew, and
        where it does not see what was asked for, it tries again, `tries` times in all (None:
        "tries" in its `sampling`); if it never does, the first try is what it gives.
        """
        seeds = [seed + k for k in range(len(talks))]
        codes = self._once(talks, settings, seeds)
        return self._looked_over(talks, codes, settings, seeds, tries)

    def _looked_over(
        self,
        talks: Sequence[list[Message]],
        codes: list[list[int]],
        settings: Settings,
        seeds: list[int],
        tries: int | None = None,
    ) -> list[list[int]]:
        """`codes`, the first tries at pictures, or better ones."""
        tries, codes = self.sampling.get("tries", 1) if tries is None else tries, list(codes)
        if tries < 2 or not self.sampling.get("look_first"):
            return codes
        least = float(self.sampling.get("try_temperature", 0.0))  # greedily, all tries are one
        settings = replace(settings, temperature=max(settings.temperature, least))
        wrong, new = list(range(len(talks))), codes
        for again in range(tries):
            if again:
                seeds_now = [(seeds[k] + again * AGAIN) % 2**63 for k in wrong]
                new = self._once([talks[k] for k in wrong], settings, seeds_now)
            seen = self._look_at(self.pictures(new))
            right = [fits(talks[k], words) for k, words in zip(wrong, seen, strict=True)]
            for k, drawn, good in zip(wrong, new, right, strict=True):
                codes[k] = drawn if good else codes[k]
            wrong = [k for k, good in zip(wrong, right, strict=True) if not good]
            if not wrong:
                break
        return codes

    def _once(
        self, talks: Sequence[list[Message]], settings: Settings, seeds: list[int]
    ) -> list[list[int]]:
        prompts = {k: words for k, talk in enumerate(talks) if (words := prompt_of(talk))}
        said = self._steps(list(prompts.values()), [seeds[k] for k in prompts])
        steps = {k: pieces for k, pieces in zip(prompts, said, strict=True) if pieces}
        whole = [k for k in range(len(talks)) if k not in steps]
        drawn = self._draw([talks[k] for k in whole], settings, [seeds[k] for k in whole])
        done, rest = dict(zip(whole, drawn, strict=True)), list(steps)
        for start in range(0, len(rest), BATCH):
            part = rest[start : start + BATCH]
            pieces, its = [steps[k] for k in part], [seeds[k] for k in part]
            for codes in self._piecewise(pieces, settings, its):
                done |= zip(part, codes, strict=True)
        return [done[k] for k in range(len(talks))]

    def _steps(self, prompts: list[str], seeds: list[int]) -> list[list[str]]:
        """What is drawn one after the other for each prompt, [] where it is all at once.

        A model that has learned to ("layout_from" in its `sampling`, a number of things;
        `scenes_layouts`) first says what is to be where: "a large cyan moon (2,3) and a small red
        star (6,6) on a white background". Where that is so many things or more, it then draws
        the background and adds each thing in its place, so that no code has to find out what
        of all that the prompt names it belongs to.
        """
        if not (least := self.sampling.get("layout_from")):
            return [[] for _ in prompts]
        settings = Settings(text_temperature=self.sampling.get("layout_temperature", 0.5))
        talks = [[user(LAYOUT + prompt)] for prompt in prompts]
        steps = [drawing_steps(words) for words in self._texts(talks, settings, seeds)]
        return [pieces if len(pieces) > least else [] for pieces in steps]

    def _piecewise(
        self, steps: list[list[str]], settings: Settings, seeds: list[int]
    ) -> Iterator[list[list[int]]]:
        """The codes of pictures after each of their steps: the background, then thing by thing."""
        grid, codes = self.processor.grid, self._grounds([pieces[0] for pieces in steps])
        yield codes
        for at in range(1, max(map(len, steps))):
            going = [k for k, pieces in enumerate(steps) if at < len(pieces)]
            talks = []
            for k in going:
                redrawn = around(steps[k][at], grid)
                shown = {"codes": codes[k], "view": MARKED, "redrawn": redrawn}
                talks.append([user(steps[k][at], shown)])
            drawn = self._draw(talks, settings, [seeds[k] for k in going])
            new = dict(zip(going, drawn, strict=True))
            codes = [new.get(k, old) for k, old in enumerate(codes)]
            yield codes

    def _grounds(self, prompts: list[str]) -> list[list[int]]:
        """The codes of plain backgrounds, drawn greedily, and kept as long as the weights are."""
        weights, known = self._plain_pictures
        known = known if weights == signature(self.model) else {}
        missing = [words for words in dict.fromkeys(prompts) if words not in known]
        settings = Settings(self._default("guidance"), 0.0)
        drawn = self._draw([[user(words)] for words in missing], settings, [0] * len(missing))
        known |= zip(missing, drawn, strict=True)
        self._plain_pictures = signature(self.model), known  # an engine may move the weights
        return [known[words] for words in prompts]

    def _draw(
        self, talks: list[list[Message]], settings: Settings, seeds: list[int]
    ) -> list[list[int]]:
        """The codes of the pictures that answer conversations."""
        codes: list[list[int]] = []
        for start in range(0, len(talks), BATCH):
            part = slice(start, start + BATCH)
            requests = self._requests(talks[part], "image", seeds[part])
            codes += [answer.codes for answer in self.engine.run(requests, settings)]
        return codes

    def _texts(self, talks: list[list[Message]], settings: Settings, seeds: list[int]) -> list[str]:
        """The words that answer conversations."""
        words: list[str] = []
        for start in range(0, len(talks), 4 * BATCH):
            part = slice(start, start + 4 * BATCH)
            requests = self._requests(talks[part], "text", seeds[part])
            words += [self.processor.text(a.text) for a in self.engine.run(requests, settings)]
        return words

    def _diffuse(
        self, texts: list[str], guidance: float, steps: int, seed: int
    ) -> list[Image.Image]:
        from unimm.inference.diffusion import UniMMDiffusionPipeline
        from unimm.model.diffusion import load_diffusion

        if self.folder is None:
            raise ValueError("a diffusion decoder is loaded with its model: use from_pretrained")
        if self._diffusion is None:
            decoder, autoencoder = load_diffusion(self.folder, "text")
            made = UniMMDiffusionPipeline(decoder, self.model, self.processor, autoencoder)
            made.set_progress_bar_config(disable=True)
            self._diffusion = made.to(self.model.decoder.norm.weight.device)
        pixels = self._diffusion(texts, guidance=guidance, steps=steps, seed=seed)
        return [to_picture(p) for p in pixels]

    def _requests(
        self, talks: list[list[Message]], mode: str, seeds: Sequence[int]
    ) -> list[Request]:
        answer = "image" if mode == "image" else "text"
        if wrong := [seed for seed in seeds if not 0 <= seed < 2**63]:
            raise ValueError(f"a seed is a whole number from 0 to 2**63, not {wrong[0]}")
        samples = [self.processor.encode(talk, answer) for talk in talks]
        return [Request(sample, mode, s) for sample, s in zip(samples, seeds, strict=True)]

    def _settings(
        self,
        guidance: float | None,
        temperature: float | None,
        top_k: int,
        top_p: float,
        kind: str = "",
    ) -> Settings:
        if guidance is None:
            guidance = self._default("guidance", kind)
        if temperature is None:
            temperature = self._default("temperature", kind)
        return Settings(guidance, temperature, top_k or self.sampling.get("top_k", 0), top_p)

    def _default(self, name: str, kind: str = "") -> float:
        """A sampling default of the model: of its own for edits (kind "edit_") where it has one."""
        return float(self.sampling.get(kind + name, self.sampling.get(name, 1.0)))

    def pictures(self, codes: Sequence[Sequence[int]]) -> list[Image.Image]:
        """The pictures of complete lists of codes."""
        dtype = self.model.decoder.norm.weight.dtype
        parts = (codes[start : start + BATCH] for start in range(0, len(codes), BATCH))
        return [to_picture(p) for part in parts for p in self.processor.pixels(part, dtype)]

    def _partial(self, codes: list[int]) -> Image.Image:
        """A picture of the codes so far; what is not drawn yet is light grey."""
        rows, columns = self.processor.grid
        missing = rows * columns - len(codes)
        picture = self.pictures([codes + [codes[-1]] * missing])[0]
        cell = (picture.width // columns, picture.height // rows)
        for k in range(len(codes), rows * columns):
            left, top = k % columns * cell[0], k // columns * cell[1]
            picture.paste((224, 224, 224), (left, top, left + cell[0], top + cell[1]))
        return picture

    def _message(self, answer: Answer) -> Message:
        parts: list[dict[str, Any]] = []
        for kind, ids in answer.parts:
            if kind == CODE:
                if len(ids) == self.processor.codes_per_image:
                    parts.append({"type": "image", "image": self.pictures([ids])[0], "codes": ids})
            elif words := self.processor.text(ids):
                parts.append({"type": "text", "text": words})
        return {"role": "assistant", "content": parts}


def edit_messages(image: Any, instruction: str, redrawn: Any = None) -> list[Message]:
    """The conversation of an edit: the instruction, then the picture, shown both ways.

    So a code of the answer is as far from the picture's own at its place, whatever is said.
    `redrawn`: which codes of the picture are drawn anew, bool (codes,); None: all.
    """
    picture = {**as_part(image), "view": BOTH if redrawn is None else MARKED}
    picture |= {} if redrawn is None else {"redrawn": redrawn}
    return [user(checked_text(instruction, "instruction"), picture)]


def fits(talk: list[Message], seen: str) -> bool:
    """Whether a picture read out in words (`seen`) is what a conversation asks for, a prompt alone
    or an edit (`UniMM.edits`); True where that cannot be told."""
    if prompt := prompt_of(talk):
        return as_asked(prompt, seen)
    parts = checked(talk[0])[1]
    if len(talk) > 1 or len(parts) != 2 or "seen" not in parts[1]:
        return True
    return as_changed(parts[1]["seen"], parts[0]["text"], seen)


def answered(messages: Sequence[Message]) -> list[Message]:
    """A conversation without what was declined in it, which a model takes for its way to speak; a
    picture that was shown with it stays."""
    dropped = set()
    for k, (asked, said) in enumerate(pairwise(messages)):
        shown = any("image" in part for part in checked(asked)[1])
        if said == assistant(UNKNOWN_ANSWER) and not shown:
            dropped |= {k, k + 1}
    return [message for k, message in enumerate(messages) if k not in dropped]


def prompt_of(talk: list[Message]) -> str:
    """The words of a conversation that is one message of nothing else; "" of any other."""
    parts = checked(talk[0])[1] if len(talk) == 1 else []
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else ""


def as_part(image: Any) -> dict[str, Any]:
    """A picture as the content part of a message; where it is one already, with its codes."""
    if not isinstance(image, dict):
        return {"image": open_image(image)}
    known = {name: image[name] for name in ("codes", "seen") if name in image}
    return {"image": open_image(image["image"]), **known}


def checked_text(text: str, what: str) -> str:
    """`text`, stripped; ValueError where nothing is left of it."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the {what} is empty: say what you want")
    return re.sub(r"\s+", " ", text.strip())


def pick_device(name: str) -> torch.device:
    """The device of that name, if it is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device is auto, cpu, cuda or mps, not {name!r}")
    there: dict[str, Callable[[], bool]] = {
        "cpu": lambda: True,
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if not there[name]():
        raise ValueError(f"there is no device {name!r} on this machine: use device cpu")
    return torch.device(name)


def describe(source: str | Path | None = None) -> str:
    """What a model is, in lines of text, from its configuration alone."""
    d = describe_model(BUNDLED if source is None else source)
    config, decoder = d.model.config, d.model.config.decoder
    modules: dict[str, torch.nn.Module] = dict(d.model.named_children())
    if d.image_tokenizer is not None:
        modules["image_tokenizer"] = d.image_tokenizer
    counted = {name: sum(p.numel() for p in part.parameters()) for name, part in modules.items()}
    if decoder.tied_embeddings:
        counted["text_head"] = 0  # it is the table of the decoder
    total, codes = sum(counted.values()), counted.get("image_tokenizer", 0)
    grid = d.image_tokenizer.grid(d.drawn_size, d.drawn_size) if d.image_tokenizer else (0, 0)
    sizes = [f"{((total - codes) * size + codes * 4) / 1e6:,.0f} MB" for size in (4, 2)]
    linear = [m for m in d.model.decoder.modules() if isinstance(m, torch.nn.Linear)]
    saved = sum(m.weight.numel() - 4 * m.out_features for m in linear)  # a byte, and the scales
    small = f"{((total - codes) * 2 - saved + codes * 4) / 1e6:,.0f} MB"
    lines = [
        f"model         {source or d.folder}",
        f"format        {d.format}",
        f"license       {d.license}",
        f"pathway       {config.pathway}",
        f"decoder       {decoder.layers} layers, {decoder.dim} wide, {decoder.heads} heads "
        f"({decoder.kv_heads} of keys), context {decoder.max_positions}, "
        f"{decoder.vocab_size} words",
        f"sees          {d.seen_size} x {d.seen_size} pixels as {d.seen_tokens} patches"
        if d.seen_tokens
        else "sees          pictures as codes",
        f"draws         {d.drawn_size} x {d.drawn_size} pixels as {grid[0] * grid[1]} codes "
        f"of {config.codebook_size}",
        f"parameters    {total:,}",
        *(f"  {name:<16}{count:,}" for name, count in counted.items()),
        f"memory        {sizes[0]} in float32, {sizes[1]} in bfloat16 or float16, "
        f"{small} with the decoder in int8",
    ]
    return "\n".join(lines)
