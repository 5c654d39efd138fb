"""The `unimm` command: a thin layer over the library's calls.

What a user can get wrong ends in one line on standard error and exit status 2, with nothing
written.
"""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

LONGEST = 1000  # characters of an error line
MODEL = "a model folder or a Hub id (name/model[@revision]); the bundled one if absent"
DTYPE = "float32, bfloat16, float16, int8, or auto for that of the files"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    return guarded(lambda: dispatch(sys.argv[1:] if argv is None else argv))


def guarded(run: Callable[[], Any]) -> int:
    """`run()`, with the errors that a user can make turned into one line and status 2."""
    try:
        run()
        return 0
    except (ValueError, OSError) as error:
        print(f"unimm: {' '.join(str(error).split())[:LONGEST]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unimm: stopped", file=sys.stderr)
        return 130


def dispatch(argv: list[str]) -> None:
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "words") and not any(word.startswith("-") for word in rest):
        args.words, rest = args.words + rest, []  # key=value words behind an option
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.run(args)


def generate(args: argparse.Namespace) -> None:
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("give either a prompt or --prompts FILE")
    if args.n < 1 or args.best_of < 1:
        raise ValueError("-n and --best-of must be 1 or more")
    prompts = [args.prompt] if args.prompts is None else read_lines(args.prompts)
    one_file = args.prompts is None and args.n == 1
    out = Path(args.out or ("out.png" if one_file else "out"))
    check_writable(out, folder=not one_file)
    model = load(args)
    how = {"best_of": args.best_of, "decoder": args.decoder, "steps": args.steps}
    how |= sampling(args)
    images = model.generate(prompts, args.n, **how)
    if not one_file:
        out.mkdir(exist_ok=True)
    for k, image in enumerate(images):
        path = out if one_file else out / f"{k // args.n:04d}-{k % args.n}.png"
        save_image(image, path)
    print(out if one_file else f"{len(images)} pictures in {out}")


def caption(args: argparse.Namespace) -> None:
    from unimm.data.images import open_image

    pictures = [open_image(path) for path in args.images]  # all are checked before any is shown
    model = load(args)
    for picture in pictures:
        print(model.caption(picture))


def ask(args: argparse.Namespace) -> None:
    from unimm.data.images import open_image
    from unimm.pipeline import checked_text

    picture, question = open_image(args.image), checked_text(args.question, "question")
    print(load(args).ask(picture, question))


def edit(args: argparse.Namespace) -> None:
    from unimm.data.images import open_image

    picture = open_image(args.image)
    check_writable(Path(args.out), folder=False)
    image = load(args).edit(picture, args.instruction, **sampling(args))
    save_image(image, Path(args.out))
    print(args.out)


def train(args: argparse.Namespace) -> None:
    from unimm.checkpoints.parts import begun
    from unimm.config import load_recipe, override, run_main
    from unimm.training.trainer import train as train_run

    recipe = load_recipe(args.recipe)
    if args.dry_run:
        from unimm.training.cost import dry_run

        if not hasattr(recipe, "config"):
            raise ValueError(f"{args.recipe} has no `config`: a run of several has no one cost")
        print(dry_run(override(recipe.config, args.words)))
    elif hasattr(recipe, "main"):
        print(run_main(recipe.main, args.words))
    elif hasattr(recipe, "config"):
        run = begun(override(recipe.config, args.words))
        if (Path(run.out) / "done").exists():
            print(f"{run.out} is finished: to train anew choose another out", file=sys.stderr)
        print(train_run(run))
    else:
        raise ValueError(f"{args.recipe} is not a recipe: it has neither `config` nor `main`")


def check_data(args: argparse.Namespace) -> None:
    from unimm.config import load_recipe, override
    from unimm.training.check_data import check_data as check
    from unimm.training.check_data import run_on

    if args.sheet:
        check_writable(Path(args.sheet), folder=False)
    if args.source.endswith(".py"):
        recipe = load_recipe(args.source)
        if not hasattr(recipe, "config"):
            raise ValueError(f"{args.source} has no `config`, so it names no sources")
        run = recipe.config
    else:
        run = run_on(args.source)
    sheet = args.sheet and Path(args.sheet)
    report, sound = check(override(run, args.words), args.n, sheet)
    print(report)
    if not sound:
        raise ValueError("too many rows are broken to train on")


def preferences(args: argparse.Namespace) -> None:
    from unimm.training import preferences as made
    from unimm.training.dpo import fingerprint

    out = Path(args.out)
    candidates = Path(args.candidates or out.with_suffix(".candidates.jsonl"))
    for path in (out, candidates, *([Path(args.right)] if args.right else [])):
        check_writable(path, folder=False, endings=(".jsonl",))
    given = [n for n in (args.prompts, args.scenes, args.edits) if n is not None]
    if len(given) > 1 or any(n < 1 for n in given if isinstance(n, int)):
        raise ValueError("give one of --prompts FILE, --scenes N and --edits N, N of 1 or more")
    if args.pairs < 1:
        raise ValueError("--pairs must be 1 or more")
    if args.misdirected is not None:
        others = (args.judge, given, args.hindsight, args.mended, args.right)
        if any(others) or args.misdirected < 1:
            raise ValueError("--misdirected N, of 1 or more, is for itself: nothing is judged")
        model = load(args)
        world = model.sampling.get("world", "scenes")
        pairs = made.misdirected_pairs(model, args.misdirected, world, args.seed)
        made.write_lines(out, pairs)
        print(json.dumps({"pairs": args.misdirected}))
        return
    if not args.judge:
        raise ValueError("--judge is wanted: checker, self, RATINGS.jsonl or FILE.py:NAME")
    for name in ("hindsight", "mended", "right"):
        if getattr(args, name) and args.judge != "checker":
            raise ValueError(f"--{name} is of what the checker sees in pictures: --judge checker")
    model = load(args)
    prompts: list[Any]
    if not given:
        if not candidates.is_file():
            raise ValueError(
                f"give --prompts, --scenes or --edits: there is no {candidates} to judge"
            )
        rows = made.read_candidates(candidates)
    else:
        world = model.sampling.get("world", "scenes")
        default = model.sampling.get("edit_guidance" if args.edits else "guidance", 1.0)
        guidance = default if args.guidance is None else args.guidance
        temperature = 1.0 if args.temperature is None else args.temperature
        of = fingerprint(model.model, args.dtype)
        how = made.Sampling(args.answers, guidance, temperature, args.seed, of=of)
        if args.prompts is not None:
            prompts = read_lines(args.prompts)
        elif args.edits is not None:
            prompts = made.scenes_edits(model, args.edits, world, args.seed)
        else:
            prompts = made.scenes_prompts(args.scenes, world, args.seed)
        rows = made.sample_candidates(model, prompts, candidates, how)
    judge = made.find_judge(args.judge, rows)
    kinds = {"hindsight": args.hindsight, "mended": args.mended}
    chosen = made.choose_pairs(model, rows, judge, out, args.margin, args.pairs, **kinds)
    if args.right:
        chosen["right"] = made.right_answers(model, rows, Path(args.right))
    print(json.dumps(chosen))


def evaluate(args: argparse.Namespace) -> None:
    from unimm.evaluation import BENCHMARKS

    if args.benchmark not in BENCHMARKS:
        names = ", ".join(BENCHMARKS)
        raise ValueError(f"no benchmark {args.benchmark!r}: choose one of {names}")
    counts = (args.n, args.seeds, args.best_of, args.tries)
    if any(count is not None and count < 1 for count in counts):
        raise ValueError("--n, --seeds, --best-of and --tries must be 1 or more")
    for path in filter(None, (args.json, args.items)):
        check_writable(Path(path), folder=False, endings=(".json",))
    options: dict[str, Any] = {} if args.n is None else {"n": args.n}
    if args.guidance is not None:
        options["guidance"] = args.guidance
    if args.best_of > 1:
        options["best_of"] = args.best_of
    if args.tries is not None:
        options["tries"] = args.tries
    if args.data:
        options["data"] = args.data
    if args.first_seed is not None:
        options["first_seed"] = args.first_seed
    run = BENCHMARKS[args.benchmark]()
    if args.before:
        options["before"] = read_json(args.before)
    taken = inspect.signature(run).parameters
    if unknown := [f"--{name.replace('_', '-')}" for name in options if name not in taken]:
        raise ValueError(f"{unknown[0]} is not an option of the benchmark {args.benchmark}")
    result = run(load(args), seeds=args.seeds, blind=args.blind, **options)
    items = json.dumps(result.pop("items"))
    text = json.dumps(result, indent=1)
    if args.items:
        write_whole(Path(args.items), lambda path: path.write_text(items + "\n"))
    if args.json:
        write_whole(Path(args.json), lambda path: path.write_text(text + "\n"))
    print(text)


def compare(args: argparse.Namespace) -> None:
    from unimm.evaluation.compare import compare as run

    print(run(args.study, args.out))


def bench(args: argparse.Namespace) -> None:
    from unimm.evaluation import bench as speed

    if min(args.rounds, args.steps, *args.batches) < 1:
        raise ValueError("--rounds, --steps and --batches must be 1 or more")
    for name, ending in ((args.json, ".json"), (args.chart, ".png")):
        if name:
            check_writable(Path(name), folder=False, endings=(ending,))
    lists = (args.sizes, args.dtypes, args.batches, args.what)
    found = speed.bench(*lists, rounds=args.rounds, steps=args.steps, model=args.model)
    if args.json:
        text = json.dumps(found, indent=1) + "\n"
        write_whole(Path(args.json), lambda path: path.write_text(text))
    if args.chart:
        write_whole(Path(args.chart), lambda path: speed.chart(found, path))
    print(speed.table(found))


def demo(args: argparse.Namespace) -> None:
    from unimm.app import launch

    ratings = Path(args.ratings)
    check_writable(ratings, folder=False, endings=(".jsonl",))
    launch(load(args), args.host, args.port, ratings)


def info(args: argparse.Namespace) -> None:
    from unimm.pipeline import describe

    print(describe(args.model))


def convert_model(args: argparse.Namespace) -> None:
    from unimm.checkpoints.convert import convert

    print(convert(args.source, args.target, args.to, args.dtype))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="unimm", description="One small model that sees pictures and draws them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, run: Callable[..., None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    p = command("generate", generate, "draw pictures")
    p.add_argument("prompt", nargs="?", help="what to draw")
    p.add_argument("--prompts", metavar="FILE", help="draw one prompt a line of FILE")
    p.add_argument("-o", "--out", help="a .png (out.png), or for several a folder (out)")
    p.add_argument("-n", type=int, default=1, help="pictures of each prompt")
    p.add_argument(
        "--best-of", type=int, default=1, metavar="N", help="draw N for each, the model picks"
    )
    p.add_argument("--decoder", default="codes", choices=["codes", "diffusion"])
    p.add_argument("--steps", type=int, default=30, metavar="N", help="of the diffusion decoder")
    add_sampling(p)
    add_model(p)
    p = command("caption", caption, "say what is in pictures, one line each")
    p.add_argument("images", nargs="+", metavar="IMAGE")
    add_model(p)
    p = command("ask", ask, "answer a question about a picture")
    p.add_argument("image", metavar="IMAGE")
    p.add_argument("question")
    add_model(p)
    p = command("edit", edit, "change a picture")
    p.add_argument("image", metavar="IMAGE")
    p.add_argument("instruction", help='for instance "make the star blue"')
    p.add_argument("-o", "--out", default="edited.png")
    add_sampling(p)
    add_model(p)
    p = command("train", train, "train as a recipe says")
    p.add_argument("recipe", metavar="RECIPE.py")
    p.add_argument("words", nargs="*", metavar="key=value", help="what to change in the recipe")
    p.add_argument("--dry-run", action="store_true", help="say what it costs, and do not train")
    p = command("data", check_data, "look at data, or a recipe's, before training on it")
    p.add_argument("what", choices=["check"])
    p.add_argument("source", metavar="SOURCE", help="RECIPE.py, or data as train/finetune.py has")
    p.add_argument("words", nargs="*", metavar="key=value", help="what to change in the recipe")
    p.add_argument("--n", type=int, default=1000, help="how many samples of each source")
    p.add_argument("--sheet", metavar="FILE.png", help="draw a contact sheet")
    p = command("preferences", preferences, "make preferences for DPO from the model's own answers")
    p.add_argument("out", metavar="OUT.jsonl")
    p.add_argument("--judge", help="checker, self, RATINGS.jsonl or FILE.py:NAME")
    p.add_argument("--prompts", metavar="FILE", help="one prompt a line")
    p.add_argument("--scenes", type=int, metavar="N", help="N prompts of the training split")
    p.add_argument("--edits", type=int, metavar="N", help="N edits of scenes of the training split")
    p.add_argument(
        "--misdirected", type=int, metavar="N", help="N edits against those of a wrong object"
    )
    p.add_argument("--answers", type=int, default=8, help="answers drawn for each prompt")
    p.add_argument("--pairs", type=int, default=1, metavar="N", help="pairs a prompt, at most")
    p.add_argument("--hindsight", action="store_true", help="pairs of true and asked prompts too")
    p.add_argument("--mended", action="store_true", help="pairs with a wrong picture put right too")
    p.add_argument("--right", metavar="FILE.jsonl", help="write right pictures there, to train on")
    p.add_argument("--candidates", metavar="FILE", help="where all answers are kept")
    p.add_argument("--margin", type=float, default=0.0, help="least difference of two scores")
    add_sampling(p, filters=False)
    add_model(p)
    p = command("eval", evaluate, "run a benchmark")
    p.add_argument("benchmark", help="scenes, sprites")
    p.add_argument("--data", metavar="DIR", help="sprites: what train/sprite_pictures.py made")
    p.add_argument("--n", type=int, help="pictures a split to draw, and as many to ask about")
    p.add_argument("--seeds", type=int, default=1, help="how many seeds")
    p.add_argument("--first-seed", type=int, help="the first of them; 1000 if absent")
    p.add_argument("--guidance", type=float, help="the model's own if absent")
    p.add_argument("--blind", action="store_true", help="control: hide prompts and pictures")
    p.add_argument("--best-of", type=int, default=1, help="the model chooses among so many")
    p.add_argument("--tries", type=int, help="at what it sees is wrong; the model's own if absent")
    p.add_argument("--json", metavar="FILE", help="write the result there too")
    p.add_argument("--items", metavar="FILE", help="write there what was right, item by item")
    p.add_argument("--before", metavar="FILE", help="another model's --items: what changed")
    add_model(p)
    p = command("compare", compare, "train and evaluate the variants of a study on one budget")
    p.add_argument("study", metavar="STUDY.py")
    p.add_argument("-o", "--out", default="runs/study", help="the folder of runs and tables")
    p = command("bench", bench, "time drawing, answering and training against transformers")
    p.add_argument(
        "what", nargs="*", default=["draw"], metavar="WHAT", help="draw, picture, answer, train"
    )
    p.add_argument("--sizes", nargs="+", default=["tiny", "mid"], help="tiny, mid")
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    p.add_argument("--batches", nargs="+", type=int, default=[1, 4], help="pictures a step")
    p.add_argument("--rounds", type=int, default=3, help="turns of each")
    p.add_argument("--steps", type=int, default=16, help="steps of a turn")
    p.add_argument("--model", metavar="DIR", help="a Hugging Face Janus folder, instead of sizes")
    p.add_argument("--json", metavar="FILE", help="write the figures there")
    p.add_argument("--chart", metavar="FILE.png", help="draw the ratios there")
    p = command("demo", demo, "open the demo in a browser")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=7860)
    p.add_argument("--ratings", default="ratings.jsonl", help="where choices of the better go")
    add_model(p)
    p = command("info", info, "say what a model is, from its configuration alone")
    p.add_argument("model", nargs="?", metavar="MODEL", help=MODEL)
    p = command("convert", convert_model, "write a model in another format")
    p.add_argument("source", metavar="SOURCE", help=MODEL)
    p.add_argument("target", metavar="TARGET", help="a folder that is not there yet")
    p.add_argument("--to", required=True, help="unimm or janus-hf")
    p.add_argument("--dtype", default="auto", help=f"of the weights: {DTYPE}")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR_OR_ID", help=MODEL)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="float32", help=DTYPE)


def add_sampling(parser: argparse.ArgumentParser, filters: bool = True) -> None:
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, help="1 for none")
    parser.add_argument("--temperature", type=float, help="0 for greedy")
    if filters:
        parser.add_argument("--top-k", type=int, default=0)
        parser.add_argument("--top-p", type=float, default=1.0)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    names = ("seed", "guidance", "temperature", "top_k", "top_p")
    return {name: getattr(args, name) for name in names}


def load(args: argparse.Namespace) -> Any:
    from unimm.pipeline import UniMM

    return UniMM.from_pretrained(args.model, args.device, args.dtype)


def read_lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt")
    return lines


def read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def check_writable(path: Path, folder: bool, endings: tuple[str, ...] = PICTURES) -> None:
    """Find out before any work that the output has a place to go."""
    if folder and path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder for several pictures")
    if not folder and path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    parent = path if folder and path.exists() else path.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"no such folder: {parent}")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} cannot be written to")
    if not folder and path.suffix.lower() not in endings:
        raise ValueError(f"{path}: name an output that ends in {', '.join(endings)}")


def save_image(image: Any, path: Path) -> None:
    form = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG")
    write_whole(path, lambda part: image.save(part, format=form))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under a temporary name, then rename: never a half-written file."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong word ends in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    raise SystemExit(main())
