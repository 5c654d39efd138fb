"""What must stay true of the code as a whole: import direction, light imports, no shadowing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RANK = {
    "config": 0, "cpu": 0, "memory": 0, "model": 0, "checkpoints": 1, "data": 1,
    "inference": 2, "training": 3, "pipeline": 3, "evaluation": 4, "app": 4, "cli": 5,
}  # fmt: skip


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "unimm").rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    part = path.relative_to(ROOT / "unimm").with_suffix("").parts[0]
    if part == "__init__":
        return
    for module in imports(path):
        if module.startswith("unimm."):
            target = module.split(".")[1]
            assert RANK[target] <= RANK[part], f"{path} imports {module}"


def test_model_reads_no_data_and_no_text():
    for path in (ROOT / "unimm/model").glob("*.py"):
        names = {m.split(".")[0] for m in imports(path)}
        assert not names & {"tokenizers", "PIL", "datasets"}, path


@pytest.mark.parametrize("folder", ["tokenizers", "train", "demo", "tests", "unimm/tokenizers"])
def test_script_folders_are_not_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / "unimm" / "tokenizers").exists()


def test_the_tokenizers_folder_does_not_shadow_the_library():
    code = "import tokenizers, transformers; print(tokenizers.Encoding.__name__)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "Encoding", run.stderr


def test_import_unimm_is_light():
    heavy = ("torch", "transformers", "diffusers", "gradio", "accelerate")
    code = f"import sys, unimm; print([m for m in {heavy!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr


def test_public_names_exist():
    import unimm

    for name in unimm.__all__:
        assert getattr(unimm, name).__name__ == name
    with pytest.raises(AttributeError):
        unimm.nothing  # noqa: B018


def test_every_file_opens_with_what_it_is():
    for folder in ("unimm", "train", "tokenizers", "demo", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_nothing_unsafe():
    banned = ("trust_remote" + "_code", "import " + "pickle", "serialization" + ".load")
    for folder in ("unimm", "train", "tokenizers", "demo"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert not [word for word in banned if word in text], path
            for call in re.findall(r"torch\.load\([^)]*\)?", text):
                assert "weights_only=True" in call, f"{path}: {call}"
