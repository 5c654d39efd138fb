"""Image to text by the library: `python demo/image_to_text.py picture.png ["question"]`."""

import sys

from unimm import UniMM
from unimm.cli import guarded


def run() -> None:
    if not 2 <= len(sys.argv) <= 3:
        raise ValueError('usage: python demo/image_to_text.py picture.png ["question"]')
    model = UniMM.from_pretrained()
    question = sys.argv[2] if len(sys.argv) == 3 else "describe the picture"
    print(model.ask(sys.argv[1], question))


if __name__ == "__main__":
    raise SystemExit(guarded(run))
