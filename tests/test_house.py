"""The project stays small, and its arrows point down: budgets and imports, held by a check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = {"gpt.py": 460, "data.py": 360, "freeze.py": 350, "lora.py": 280, "finetune.py": 600,
         "evaluate.py": 620}
GROUND = {"gpt", "data", "freeze", "lora"}
SIX = GROUND | {"finetune", "evaluate"}

def text(path):
    return (ROOT / path).read_text(encoding="utf-8")

def lines_of(folder):
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*.py"))

def imports(tree, nested):
    """Names of the siblings that a module imports, at its top or anywhere inside."""
    names = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & SIX

@pytest.mark.parametrize("file, limit", LINES.items())
def test_each_file_is_within_its_lines_and_columns(file, limit):
    lines = text(file).splitlines()
    assert len(lines) <= limit
    assert max(map(len, lines)) <= 100

def test_all_six_together_are_within_their_lines_and_characters():
    assert sum(len(text(file).splitlines()) for file in LINES) <= 2500
    assert sum(len(text(file)) for file in LINES) <= 125_000

@pytest.mark.parametrize("file", [*LINES, *(f"experiments/{name}.py" for name in
                                            ("choose_layers", "shape_data", "tables"))])
def test_no_function_is_over_60_lines_but_parse_args(file):
    for node in ast.walk(ast.parse(text(file))):
        if isinstance(node, ast.FunctionDef) and node.name != "parse_args":
            assert node.end_lineno - node.lineno < 60, node.name

def test_readme_experiments_and_tests_are_within_their_budgets():
    readme = text("README.md")
    assert len(readme.splitlines()) <= 320 and len(readme.split()) <= 2600
    assert lines_of(ROOT / "experiments") <= 700
    assert lines_of(ROOT / "tests") <= 5000
    assert len(text("tests/bench.py").splitlines()) <= 400
    recipes = [n for n in ast.parse(text("recipes.py")).body if isinstance(n, ast.FunctionDef)]
    assert len(recipes) == 9 and all(n.end_lineno - n.lineno < 15 for n in recipes)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("experiments/*.py")):
        assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100, path.name

def test_imports_point_down():
    for file in LINES:
        tree, name = ast.parse(text(file)), file[:-3]
        if name in GROUND:
            assert not imports(tree, nested=False), name  # each can be copied alone
            assert imports(tree, nested=True) <= GROUND - {name}, name
        elif name == "evaluate":
            assert not imports(tree, nested=False) and imports(tree, nested=True) <= GROUND
    assert "finetune" not in set().union(*(imports(ast.parse(text(file)), True) for file in LINES))

def test_no_block_of_eight_equal_lines_stands_in_two_files():
    seen = {}
    for file in LINES:
        lines = [line.strip() for line in text(file).splitlines() if line.strip()]
        for i in range(len(lines) - 7):
            other = seen.setdefault(tuple(lines[i:i + 8]), file)
            assert other == file, (other, file, lines[i])

def test_packages_are_torch_and_tiktoken_alone():
    allowed = {"torch", "tiktoken", "tiktoken_ext", "matplotlib"} | SIX
    for file in LINES:
        for module in re.findall(r"^\s*(?:from|import) (\w+)", text(file), re.M):
            assert module in allowed or module in __import__("sys").stdlib_module_names, module
