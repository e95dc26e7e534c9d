"""Blocks marked `# Copied from FILE` equal their original.

python tests/test_copies.py --write     # after a change of an original: bring all copies up to date
"""

import ast
import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = sorted(ROOT.glob("0[1-5]_*.py"))
MARK = re.compile(r"^# Copied from (0\d_\w+\.py)$")


@functools.cache
def blocks(path: Path) -> dict[str, tuple[int, int]]:
    """Name of each top-level function, class or constant -> its lines (first, last + 1), with its
    comment."""
    found, lines = {}, path.read_text().splitlines()
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
        elif isinstance(node, ast.AnnAssign):
            name = ast.unparse(node.target)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = node.name
        else:
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while lines[first - 1].startswith("# ") and not MARK.match(lines[first - 1]):
            first -= 1
        found[name] = (first, node.end_lineno)
    return found


def copies(path: Path) -> list[tuple[str, str, int, int]]:
    """(original file, name, first line, last line + 1) of each marked block."""
    lines = path.read_text().splitlines()
    starts = {span[0]: (name, span[1]) for name, span in blocks(path).items()}
    found = []
    for number, line in enumerate(lines):
        if match := MARK.match(line):
            assert number + 1 in starts, (
                f"{path.name}, line {number + 1}: no function, class or constant below the mark"
            )
            found.append((match[1], starts[number + 1][0], number + 1, starts[number + 1][1]))
    return found


def original(file: str, name: str) -> list[str]:
    path = ROOT / file
    if name not in blocks(path):
        sys.exit(f"{file} has no {name} any more; remove its copies")
    first, last = blocks(path)[name]
    assert not MARK.match(path.read_text().splitlines()[first - 1]), (
        f"{file}: {name} is a copy itself; name its owner"
    )
    return path.read_text().splitlines()[first:last]


def test_copies_equal_their_original():
    for path in STAGES:
        lines = path.read_text().splitlines()
        for file, name, first, last in copies(path):
            assert lines[first:last] == original(file, name), (
                f"{path.name}: {name} has drifted from {file}; "
                "run python tests/test_copies.py --write"
            )


def lacking(path: Path) -> list[str]:
    """What copies in this file use of their original that this file has not: a NameError, which
    the grader would take for a wrong answer."""
    faults = []
    for file, name, first, last in copies(path):
        block = ast.parse("\n".join(path.read_text().splitlines()[first:last]))
        used = {part.id for part in ast.walk(block) if isinstance(part, ast.Name)}
        for missing in sorted(used & top_names(ROOT / file) - top_names(path)):
            faults.append(f"{path.name}: {name} uses {missing}, which {file} has; copy it too")
    return faults


@functools.cache
def top_names(path: Path) -> set[str]:
    imports = [
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    imported = {a.asname or a.name.split(".")[0] for node in imports for a in node.names}
    return set(blocks(path)) | imported


def test_copies_have_what_they_use():
    assert not [fault for path in STAGES for fault in lacking(path)]


def test_a_copy_without_what_it_uses_is_named(tmp_path, monkeypatch):
    """A researcher adds a function to 01, calls it in algebra_verdict() and runs --write."""
    for path in STAGES[:2]:
        (tmp_path / path.name).write_text(path.read_text())
    one = tmp_path / STAGES[0].name
    call = "def algebra_verdict(gold: str, prediction: str) -> bool:\n"
    assert call in one.read_text()
    text = one.read_text().replace(call, "def tidy(text):\n    return text\n\n\n" + call)
    one.write_text(
        text.replace("def parsed(text: str):\n", "def parsed(text: str):\n        tidy(text)\n")
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert write(tmp_path / STAGES[1].name) == ["algebra_verdict"]
    [fault] = lacking(tmp_path / STAGES[1].name)
    assert "algebra_verdict uses tidy" in fault


def test_every_shared_block_is_marked():
    """A block that two stages have under one name is either marked as a copy or differs on
    purpose."""
    own = {"Args", "main", "ROW_CODE", "check_options"}
    for path in STAGES:
        marked = {name for _, name, _, _ in copies(path)}
        for other in STAGES:
            theirs = {name for _, name, _, _ in copies(other)}
            shared = (
                (set(blocks(path)) - marked) & (set(blocks(other)) - theirs) - own
                if other > path
                else set()
            )
            assert not shared, f"{path.name} and {other.name} both own {shared}"


def test_stages_import_no_stage():
    local = {path.stem for path in ROOT.glob("*.py")} | {
        path.name for path in ROOT.iterdir() if path.is_dir()
    }
    for path in STAGES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not local & {name.split(".")[0] for name in names}, (
                f"{path.name} imports from the project"
            )
        # a stage's name is none for `import`
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"importlib.import_module", "__import__", "runpy.run_path", "exec"}


def test_stages_load_outside_the_repository(tmp_path):
    copied = [shutil.copy(path, tmp_path) for path in STAGES]
    code = "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]"
    # -I: neither this folder nor PYTHONPATH
    subprocess.run([sys.executable, "-I", "-c", code, *copied], cwd=tmp_path, check=True)


def write(stage: Path) -> list[str]:
    """Bring the copies in a stage up to date. Returns their names."""
    lines, written = stage.read_text().splitlines(), []
    for file, name, first, last in reversed(copies(stage)):
        if lines[first:last] != original(file, name):
            lines[first:last] = original(file, name)
            written.append(name)
    stage.write_text("\n".join(lines) + "\n")
    blocks.cache_clear()
    return written


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    for stage in STAGES:
        if written := write(stage):
            print(f"{stage.name}: replaced {', '.join(written)}")
    if faults := [fault for stage in STAGES for fault in lacking(stage)]:
        sys.exit("\n".join(faults))
