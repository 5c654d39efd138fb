"""The Gradio demo: draw, ask, edit, chat. `python demo/app.py`, or `unimm demo`."""

import sys

from unimm.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["demo", *sys.argv[1:]]))
