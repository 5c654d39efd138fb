"""Text to image by the library: `python demo/text_to_image.py "a red circle" [out.png]`."""

import sys
from pathlib import Path

from unimm import UniMM
from unimm.cli import check_writable, guarded, save_image
from unimm.pipeline import checked_text


def run() -> None:
    if not 2 <= len(sys.argv) <= 3:
        raise ValueError('usage: python demo/text_to_image.py "a red circle" [out.png]')
    prompt = checked_text(sys.argv[1], "prompt")
    out = Path(sys.argv[2] if len(sys.argv) == 3 else "out.png")
    check_writable(out, folder=False)
    save_image(UniMM.from_pretrained().generate(prompt, seed=0), out)
    print(out)


if __name__ == "__main__":
    raise SystemExit(guarded(run))
