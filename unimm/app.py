"""The Gradio demo: draw, ask, edit and chat with one model. `unimm demo` opens it."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from unimm.data.images import open_image
from unimm.data.scenes import Object, Scene, render
from unimm.pipeline import UniMM, checked_text

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
CHANGES = ["make the circle green", "remove the star", "make the background yellow"]
OPENINGS = ["draw a red circle and a blue star", "what is in the picture?", "make the star green"]
SHOWN = 320  # side of a picture on the page, in pixels
MAX_UPLOAD = "20mb"
MAX_WAITING = 32  # calls in the queue
MAX_SEED = 2**32 - 1


def build(model: UniMM) -> Any:
    """The page, a `gradio.Blocks`, with the endpoints /draw, /ask, /caption, /edit and /chat."""
    import gradio as gr

    def refusal(error: ValueError) -> gr.Error:
        """A user's mistake as a message on the page."""
        return gr.Error(" ".join(str(error).split()), print_exception=False)

    def draw(
        prompt: str, n: float, guidance: float, temperature: float, seed: float | None
    ) -> Iterator[list[Image.Image]]:
        how = dict(guidance=guidance, temperature=temperature, seed=int(seed or 0))
        try:
            if n == 1:  # row by row, as it comes
                rows = model.generate_stream(prompt, model.processor.grid[1], **how)
                yield from ([enlarged(picture)] for picture in rows)
            else:
                yield [enlarged(picture) for picture in model.generate([prompt], int(n), **how)]
        except ValueError as error:
            raise refusal(error) from None

    def ask(upload: dict | None, question: str) -> str:
        try:
            return model.ask(opened(upload, model), question)
        except ValueError as error:
            raise refusal(error) from None

    def caption(upload: dict | None) -> str:
        try:
            return model.caption(opened(upload, model))
        except ValueError as error:
            raise refusal(error) from None

    def edit(upload: dict | None, change: str, seed: float | None) -> Image.Image:
        try:
            return enlarged(model.edit(opened(upload, model), change, seed=int(seed or 0)))
        except ValueError as error:
            raise refusal(error) from None

    def chat(text: str, talk: list[dict]) -> tuple:
        try:
            words = {"type": "text", "text": checked_text(text, "message")}
            talk = model.chat([*talk, {"role": "user", "content": [words]}], seed=len(talk))
        except ValueError as error:
            raise refusal(error) from None
        return "", [bubble for message in talk for bubble in bubbles(message)], talk

    def bubbles(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """One message as Gradio's chat shows it."""
        for part in message["content"] or [{"type": "text", "text": "(no answer)"}]:
            content = (
                part["text"]
                if part["type"] == "text"
                else gr.Image(
                    enlarged(part["image"]), format="png", show_label=False, buttons=["download"]
                )
            )
            yield {"role": message["role"], "content": content}

    # Calls take their turns at the one model. Pictures come as raw uploads (preprocess=False), so
    # that `open_image`, and not Gradio, says what is wrong with them.
    turn: dict[str, Any] = dict(concurrency_id="model", concurrency_limit=1)
    raw: dict[str, Any] = dict(preprocess=False, **turn)
    example = enlarged(example_picture(model.processor.seen_size))
    strongest = max(8.0, model.sampling.get("guidance", 1.0))
    with gr.Blocks(title="unimm", analytics_enabled=False) as page:
        gr.Markdown("# unimm\nOne small model that sees pictures and draws them.")
        with gr.Tab("Draw"):
            prompt = gr.Textbox(label="Prompt", value=EXAMPLES[0])
            gr.Examples([[e] for e in EXAMPLES], [prompt], label="Examples")
            with gr.Row():
                n = gr.Slider(1, 8, value=4, step=1, label="Pictures")
                guidance = model.sampling.get("guidance", 1.0)
                strength = gr.Slider(1, strongest, value=guidance, step=0.25, label="Guidance")
                heat = gr.Slider(0, 1.5, value=1.0, step=0.05, label="Temperature")
                seed = gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed")
            button = gr.Button("Draw", variant="primary")
            gallery = gr.Gallery(label="Pictures", columns=4, format="png", object_fit="contain")
            inputs = [prompt, n, strength, heat, seed]
            gr.on([button.click, prompt.submit], draw, inputs, gallery, api_name="draw", **turn)
        with gr.Tab("Ask"), gr.Row():
            seen = gr.Image(example, label="Picture", height=SHOWN, format="png")
            with gr.Column():
                question = gr.Textbox(label="Question", value=QUESTIONS[0])
                gr.Examples([[q] for q in QUESTIONS], [question], label="Examples")
                with gr.Row():
                    asked = gr.Button("Ask", variant="primary")
                    described = gr.Button("Describe the picture")
                answer = gr.Textbox(label="Answer", lines=2, interactive=False)
            both = [asked.click, question.submit]
            gr.on(both, ask, [seen, question], answer, api_name="ask", **raw)
            described.click(caption, [seen], answer, api_name="caption", **raw)
        with gr.Tab("Edit"), gr.Row():
            before = gr.Image(example, label="Picture", height=SHOWN, format="png")
            with gr.Column():
                change = gr.Textbox(label="Change", value=CHANGES[0])
                gr.Examples([[c] for c in CHANGES], [change], label="Examples")
                again = gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed")
                edited = gr.Button("Edit", variant="primary")
            after = gr.Image(label="Result", height=SHOWN, format="png", interactive=False)
            both = [edited.click, change.submit]
            gr.on(both, edit, [before, change, again], after, api_name="edit", **raw)
        with gr.Tab("Chat"):
            talk = gr.State([])
            window = gr.Chatbot(
                label="Draw it, ask about it, change it", height=460, render_markdown=False
            )
            line = gr.Textbox(label="You", placeholder=OPENINGS[0], submit_btn=True)
            with gr.Row():
                gr.Examples([[o] for o in OPENINGS], [line], label="Examples")
                fresh = gr.Button("New conversation")
            line.submit(chat, [line, talk], [line, window, talk], api_name="chat", **turn)
            fresh.click(lambda: ([], []), None, [window, talk], api_visibility="private")
    return page


def launch(model: UniMM, host: str = "127.0.0.1", port: int = 7860, **options: Any) -> Any:
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
    return build(model).queue(max_size=MAX_WAITING).launch(**options)


def opened(upload: dict | None, model: UniMM) -> Image.Image:
    """The uploaded picture; one that the page had enlarged comes back as the model drew it."""
    if not upload or not upload.get("path"):
        raise ValueError("choose a picture first")
    path = Path(upload["path"])
    try:
        picture = open_image(path)
    except ValueError as error:  # name the file as the user knows it
        raise ValueError(
            str(error).replace(str(path), upload.get("orig_name") or path.name)
        ) from None
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
