"""Image to text by the library: `python demo/image_to_text.py picture.png ["question"]`."""

import sys

from unimm import UniMM
from unimm.cli import guarded
from unimm.data.images import open_image
from unimm.pipeline import checked_text


def run() -> None:
    if not 2 <= len(sys.argv) <= 3:
        raise ValueError('usage: python demo/image_to_text.py picture.png ["question"]')
    question = sys.argv[2] if len(sys.argv) == 3 else "describe the picture"
    picture, question = open_image(sys.argv[1]), checked_text(question, "question")
    print(UniMM.from_pretrained().ask(picture, question))


if __name__ == "__main__":
    raise SystemExit(guarded(run))
