"""Text to image by the library: `python demo/text_to_image.py "a red circle" [out.png]`."""

import sys

from unimm import UniMM
from unimm.cli import guarded


def run() -> None:
    if not 2 <= len(sys.argv) <= 3:
        raise ValueError('usage: python demo/text_to_image.py "a red circle" [out.png]')
    model = UniMM.from_pretrained()
    out = sys.argv[2] if len(sys.argv) == 3 else "out.png"
    model.generate(sys.argv[1], seed=0).save(out)
    print(out)


if __name__ == "__main__":
    raise SystemExit(guarded(run))
