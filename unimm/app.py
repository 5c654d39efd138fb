"""The Gradio demo: draw, ask, edit and chat with one model. `unimm demo` opens it."""

from typing import Any

from unimm.pipeline import UniMM

EXAMPLES = [
    "a red circle left of a blue star",
    "three green rings",
    "a small pink heart and a moon",
]
SHOWN = 320  # side of a picture on the page, in pixels
MAX_UPLOAD = "20mb"


def build(model: UniMM) -> Any:
    """The page, a `gradio.Blocks`, with the endpoints /draw, /ask, /edit and /chat."""
    import gradio as gr

    def refuse(call: Any) -> Any:
        """Show a user's mistake as a message on the page."""
        try:
            return call()
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def draw(prompt: str, n: float, guidance: float, temperature: float, seed: float) -> list:
        def call() -> list:
            images = model.generate(
                [prompt], int(n), guidance=guidance, temperature=temperature, seed=int(seed)
            )
            return [enlarged(image) for image in images]

        return refuse(call)

    def ask(image: Any, question: str) -> str:
        return refuse(lambda: model.ask(given(image), question))

    def describe(image: Any) -> str:
        return refuse(lambda: model.caption(given(image)))

    def edit(image: Any, instruction: str, seed: float) -> Any:
        return refuse(lambda: enlarged(model.edit(given(image), instruction, seed=int(seed))))

    def chat(text: str, history: list, talk: list) -> tuple:
        messages = [*talk, {"role": "user", "content": [{"type": "text", "text": text}]}]
        messages = refuse(lambda: model.chat(messages, seed=len(talk)) if text.strip() else talk)
        return "", [bubble for message in messages for bubble in bubbles(message, gr)], messages

    guidance = float(model.sampling.get("guidance", 1.0))
    with gr.Blocks(title="unimm") as page:
        gr.Markdown("# unimm\nOne small model that sees pictures and draws them.")
        with gr.Tab("Draw"):
            prompt = gr.Textbox(label="Prompt", value=EXAMPLES[0])
            with gr.Row():
                n = gr.Slider(1, 8, value=4, step=1, label="Pictures")
                strength = gr.Slider(1, 8, value=guidance, step=0.25, label="Guidance")
                heat = gr.Slider(0, 1.5, value=1.0, step=0.05, label="Temperature")
                seed = gr.Number(0, precision=0, label="Seed")
            button = gr.Button("Draw", variant="primary")
            gallery = gr.Gallery(label="Pictures", columns=4, height=SHOWN + 40, format="png")
            inputs = [prompt, n, strength, heat, seed]
            button.click(draw, inputs, gallery, api_name="draw", concurrency_id="model")
            prompt.submit(draw, inputs, gallery, api_visibility="private", concurrency_id="model")
            gr.Examples([[e] for e in EXAMPLES], [prompt])
        with gr.Tab("Ask"), gr.Row():
            seen = gr.Image(type="pil", label="Picture", height=SHOWN)
            with gr.Column():
                question = gr.Textbox(label="Question", value="how many stars are there?")
                ask_button = gr.Button("Ask", variant="primary")
                caption_button = gr.Button("Describe")
                answer = gr.Textbox(label="Answer", lines=2)
            ask_button.click(ask, [seen, question], answer, api_name="ask", concurrency_id="model")
            caption_button.click(
                describe, [seen], answer, api_name="caption", concurrency_id="model"
            )
        with gr.Tab("Edit"), gr.Row():
            before = gr.Image(type="pil", label="Picture", height=SHOWN)
            with gr.Column():
                change = gr.Textbox(label="Change", value="make the circle green")
                edit_seed = gr.Number(0, precision=0, label="Seed")
                edit_button = gr.Button("Edit", variant="primary")
            after = gr.Image(label="Result", height=SHOWN, format="png")
            edit_button.click(
                edit, [before, change, edit_seed], after, api_name="edit", concurrency_id="model"
            )
        with gr.Tab("Chat"):
            talk = gr.State([])
            window = gr.Chatbot(label="Draw it, ask about it, change it", height=420)
            line = gr.Textbox(label="You", placeholder="draw a red circle and a blue star")
            line.submit(
                chat, [line, window, talk], [line, window, talk],
                api_name="chat", concurrency_id="model",
            )  # fmt: skip
            gr.Button("New conversation").click(
                lambda: ([], []), None, [window, talk], api_visibility="private"
            )
    return page


def launch(model: UniMM, host: str = "127.0.0.1", port: int = 7860, **options: Any) -> Any:
    """Serve the page; blocks unless `prevent_thread_lock=True`. ValueError for a port in use."""
    page = build(model).queue(max_size=32)
    options = {"max_file_size": MAX_UPLOAD, "server_name": host, "server_port": port, **options}
    try:
        return page.launch(**options)
    except OSError as error:
        raise ValueError(f"the demo cannot be opened on {host}:{port}: {error}") from None


def given(image: Any) -> Any:
    if image is None:
        raise ValueError("choose a picture first")
    return image


def enlarged(image: Any) -> Any:
    """A small picture at a size that a page can show, pixel for pixel."""
    factor = max(1, SHOWN // max(image.size))
    return image.resize((image.width * factor, image.height * factor), 0)


def bubbles(message: dict[str, Any], gr: Any) -> list[dict[str, Any]]:
    """One message as Gradio's chat shows it."""
    shown = []
    for part in message["content"]:
        content = part["text"] if part["type"] == "text" else gr.Image(enlarged(part["image"]))
        shown.append({"role": message["role"], "content": content})
    return shown
