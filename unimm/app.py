"""The Gradio demo: draw, ask, edit, chat, and prefer one picture. `unimm demo` opens it."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from unimm.data.images import open_image
from unimm.data.processor import user
from unimm.data.scenes import Object, Scene, render
from unimm.pipeline import UniMM, checked_text
from unimm.training.preferences import Sampling, add_preference, name_of, sample, shown

EXAMPLES = [
    "a red circle left of a blue star",
    "three green rings",
    "a small pink heart and a purple moon",
    "two yellow stars on a gray background",
]
QUESTIONS = [
    "how many stars are there?",
    "what color is the star?",
    "what is left of the blue star?",
]
CHANGES = ["make the circle green", "remove the star", "make the background mint"]
OPENINGS = ["draw a red circle and a blue star", "what is in the picture?", "make the star green"]
SHOWN = 320  # side of a picture on the page, in pixels
MAX_UPLOAD = "20mb"
MAX_WAITING = 32  # calls in the queue
MOST, HOTTEST, MAX_SEED = 8, 1.5, 2**32 - 1  # pictures of a call, temperature, seed


def build(model: UniMM, ratings: str | Path = "ratings.jsonl") -> Any:
    """The page, a `gradio.Blocks`; endpoints /draw, /ask, /caption, /edit, /chat, /compare,
    /prefer_left and /prefer_right.

    Choices between two pictures are appended to `ratings`, a file that `train/dpo.py` reads.
    """
    import gradio as gr

    guidance = float(model.sampling.get("guidance", 1.0))
    usual = float(model.sampling.get("temperature", 1.0))
    strongest = max(8.0, guidance)
    decoders = ["codes"]
    if model.folder is not None and (model.folder / "diffusion_text.json").exists():
        decoders += ["diffusion", "both"]
    lossless: dict[str, Any] = dict(format="png", buttons=["download", "fullscreen"])

    @contextmanager
    def mistakes_shown() -> Iterator[None]:
        """A user's mistake is a message on the page, in one line."""
        try:
            yield
        except ValueError as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from None

    def draw(
        prompt: str, n: float, guidance: float, temperature: float, seed: float, decoder: str
    ) -> Iterator[list[Any]]:
        with mistakes_shown():
            if decoder not in decoders:
                raise ValueError(f"Decoder is one of {', '.join(decoders)}")
            if words := model.unknown(checked_text(prompt, "prompt")):
                gr.Warning(f"This model knows simple scenes only, and not: {', '.join(words)}")
            count = int(within("Pictures", n, 1, MOST))
            how: dict[str, Any] = dict(
                guidance=within("Guidance", guidance, 1, strongest),
                temperature=within("Temperature", temperature, 0, HOTTEST),
                seed=int(within("Seed", seed, 0, MAX_SEED)),
            )
            if decoder != "codes":
                used = decoders[:2] if decoder == "both" else [decoder]
                drawn = [model.generate([prompt], count, **how, decoder=name) for name in used]
                sets = zip(*drawn, strict=True)  # of one seed side by side
                yield [(enlarged(p), f) for s in sets for p, f in zip(s, used, strict=True)]
            elif count == 1:  # row by row, as it comes
                for picture in model.generate_stream(prompt, model.processor.grid[1], **how):
                    yield [enlarged(picture)]
            else:
                yield [enlarged(picture) for picture in model.generate([prompt], count, **how)]

    def ask(upload: dict | None, question: str) -> str:
        with mistakes_shown():
            return model.ask(opened(upload, model), question)

    def caption(upload: dict | None) -> str:
        with mistakes_shown():
            return model.caption(opened(upload, model))

    def edit(upload: dict | None, change: str, seed: float) -> Image.Image:
        with mistakes_shown():
            start = int(within("Seed", seed, 0, MAX_SEED))
            return enlarged(model.edit(opened(upload, model), change, seed=start))

    def chat(text: str, talk: list[dict]) -> tuple[str, list[dict], list[dict]]:
        with mistakes_shown():
            words = {"type": "text", "text": checked_text(text, "message")}
            talk = model.chat([*talk, {"role": "user", "content": [words]}], seed=len(talk))
        return "", [bubble for message in talk for bubble in bubbles(message)], talk

    def compare(prompt: str, seed: float) -> tuple[Image.Image, Image.Image, dict, str]:
        with mistakes_shown():
            talk = [user(checked_text(prompt, "prompt"))]
            how = Sampling(2, guidance, 1.0, int(within("Seed", seed, 0, MAX_SEED)))
            (row,) = sample(model, {name_of(talk, how): {"prompt": talk}}, how)
            if len(row["answers"]) < 2:
                raise ValueError("both pictures came out the same: try another seed")
            left, right = (enlarged(shown(model, answer)) for answer in row["answers"])
        return left, right, row, ""

    def prefer(best: int, row: dict | None) -> tuple[str, None]:
        with mistakes_shown():
            if not row:
                raise ValueError("draw two pictures first")
            count = add_preference(Path(ratings), row, best, 1 - best)
        return f"{count} in {Path(ratings).name}", None

    def bubbles(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """One message as Gradio's chat shows it."""
        for part in message["content"] or [{"type": "text", "text": "(no answer)"}]:
            content = part.get("text")
            if part["type"] == "image":
                content = gr.Image(enlarged(part["image"]), show_label=False, **lossless)
            yield {"role": message["role"], "content": content}

    # Calls take their turns at the one model. Inputs come raw (preprocess=False), so that this
    # file, and not Gradio with a traceback, says what is wrong with them.
    how_run: dict[str, Any] = dict(concurrency_id="model", concurrency_limit=1, preprocess=False)
    given: dict[str, Any] = dict(height=SHOWN + 40, sources=["upload", "clipboard"], **lossless)
    example = enlarged(example_picture(model.processor.seen_size))
    with gr.Blocks(title="unimm", analytics_enabled=False) as page:
        gr.Markdown("# unimm\nOne small model that sees pictures and draws them.")
        with gr.Tab("Draw"):
            prompt = gr.Textbox(label="Prompt", value=EXAMPLES[0])
            gr.Examples([[e] for e in EXAMPLES], [prompt], label="Examples")
            with gr.Row():
                n = gr.Slider(1, MOST, value=4, step=1, label="Pictures")
                strength = gr.Slider(1, strongest, value=guidance, step=0.25, label="Guidance")
                heat = gr.Slider(0, HOTTEST, value=usual, step=0.05, label="Temperature")
                seed = gr.Number(0, precision=0, label="Seed")
                decoder = gr.Radio(
                    decoders, value="codes", label="Decoder", visible=len(decoders) > 1
                )
            button = gr.Button("Draw", variant="primary")
            gallery = gr.Gallery(
                label="Pictures", columns=4, fit_columns=False, height="auto", **lossless
            )
            inputs = [prompt, n, strength, heat, seed, decoder]
            gr.on([button.click, prompt.submit], draw, inputs, gallery, api_name="draw", **how_run)
        with gr.Tab("Ask"), gr.Row():
            seen = gr.Image(example, label="Picture", **given)
            with gr.Column():
                question = gr.Textbox(label="Question", value=QUESTIONS[0])
                gr.Examples([[q] for q in QUESTIONS], [question], label="Examples")
                with gr.Row():
                    asked = gr.Button("Ask", variant="primary")
                    described = gr.Button("Describe")
                answer = gr.Textbox(label="Answer", lines=2, interactive=False)
            both = [asked.click, question.submit]
            gr.on(both, ask, [seen, question], answer, api_name="ask", **how_run)
            described.click(caption, [seen], answer, api_name="caption", **how_run)
        with gr.Tab("Edit"), gr.Row():
            before = gr.Image(example, label="Picture", **given)
            with gr.Column():
                change = gr.Textbox(label="Change", value=CHANGES[0])
                gr.Examples([[c] for c in CHANGES], [change], label="Examples")
                again = gr.Number(0, precision=0, label="Seed")
                edited = gr.Button("Edit", variant="primary")
            after = gr.Image(label="Result", interactive=False, height=SHOWN + 40, **lossless)
            both = [edited.click, change.submit]
            gr.on(both, edit, [before, change, again], after, api_name="edit", **how_run)
        with gr.Tab("Compare"):
            with gr.Row():
                topic = gr.Textbox(label="Prompt", value=EXAMPLES[0], scale=3)
                first = gr.Number(0, precision=0, label="Seed")
            two = gr.Button("Draw two", variant="primary")
            pair: Any = gr.State()
            sides: list[Any] = []
            with gr.Row():
                for name in ("Left", "Right"):
                    with gr.Column():
                        sides.append(gr.Image(label=name, interactive=False, **lossless))
                        sides.append(gr.Button(f"{name} is better"))
            kept = gr.Textbox(label="Choices", interactive=False)
            pictures = [sides[0], sides[2], pair, kept]
            both = [two.click, topic.submit]
            gr.on(both, compare, [topic, first], pictures, api_name="compare", **how_run)
            for best, side in enumerate((sides[1], sides[3])):
                name = ("prefer_left", "prefer_right")[best]
                chosen = partial(prefer, best)
                side.click(chosen, [pair], [kept, pair], api_name=name, **how_run)
        with gr.Tab("Chat"):
            talk = gr.State([])
            window = gr.Chatbot(
                label="Draw it, ask about it, change it",
                height=460,
                render_markdown=False,
                buttons=[],
            )
            line = gr.Textbox(label="You", placeholder=OPENINGS[0], submit_btn=True)
            gr.Examples([[o] for o in OPENINGS], [line], label="Examples")
            fresh = gr.Button("New conversation")
            line.submit(chat, [line, talk], [line, window, talk], api_name="chat", **how_run)
            both = [fresh.click, window.clear]
            gr.on(both, lambda: ([], []), None, [window, talk], api_visibility="private")
    return page


def launch(
    model: UniMM,
    host: str = "127.0.0.1",
    port: int = 7860,
    ratings: str | Path = "ratings.jsonl",
    **options: Any,
) -> Any:
    """Serve the page; blocks unless `prevent_thread_lock=True`. Port 0 takes a free one.

    Returns what `gradio.Blocks.launch` does: (app, local address, shared address). ValueError
    where the address cannot be had, for instance a port in use.
    """
    try:
        with socket.create_server((host, port)) as probe:
            port = probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"the demo cannot open {host}:{port} ({reason}): choose another --port or --host"
        ) from None
    options = {"max_file_size": MAX_UPLOAD, "server_name": host, "server_port": port, **options}
    return build(model, ratings).queue(max_size=MAX_WAITING).launch(**options)


def within(name: str, value: Any, least: float, most: float) -> float:
    if not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{name} is a number from {least:.0f} to {most:.10g}")
    return value


def opened(upload: dict | None, model: UniMM) -> Image.Image:
    """The uploaded picture; one that the page had enlarged comes back as the model drew it."""
    if not upload or not upload.get("path"):
        raise ValueError("choose a picture first")
    path = Path(upload["path"])
    try:
        picture = open_image(path)
    except ValueError as error:  # name the file as the user knows it
        name = upload.get("orig_name") or path.name
        raise ValueError(str(error).replace(str(path), name)) from None
    small = picture.resize((model.processor.drawn_size,) * 2, Image.Resampling.NEAREST)
    return small if enlarged(small) == picture else picture


def enlarged(picture: Image.Image) -> Image.Image:
    """A small picture at a size that a page can show, each pixel a square."""
    factor = max(1, SHOWN // max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def example_picture(side: int) -> Image.Image:
    objects = Object("circle", "red", "large", 0.3, 0.4), Object("star", "blue", "large", 0.7, 0.65)
    return Image.fromarray(render(Scene(objects, "white"), side))
