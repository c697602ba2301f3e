"""README.md: every command in it runs, or says what it needs that a test has not."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import data
import evaluate
import finetune
import freeze
import gpt
import lora
from data import load_examples, load_tokenizer, save_tokenizer
from gpt import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NEEDS = re.compile(r"download|server|GPU|network|minutes|hours?\b|installs")  # a comment that says why a command is not run here
ELSEWHERE = {"tiny/make.py", "tiny/experiments.py", "tests/bench.py", "-m"}  # tested in test_tiny.py, or the tests themselves
SCRIPTS = {"data.py": data.main, "evaluate.py": evaluate.main, "finetune.py": finetune.main, "freeze.py": freeze.main,
           "gpt.py": gpt.main, "lora.py": lora.main}


def commands() -> list[tuple[str, str]]:
    """(command, its comment) of every line in README's code blocks that starts a program."""
    lines = [line.removeprefix("$ ") for block in re.findall(r"^```\w*\n(.*?)^```", README.replace("\\\n", ""), re.M | re.S) for line in block.splitlines()]
    parts = [re.split(r"\s+# ", line, maxsplit=1) for line in lines if re.match(r"([A-Z_]+=\S+ )*(python|torchrun|uv|pip) ", line)]
    return [(command, comment[0] if comment else "") for command, *comment in parts]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty folder with what the README's commands find at a user's: records, a model, a text."""
    folder = tmp_path_factory.mktemp("readme")
    tokenizer, model = load_tokenizer("tiny"), GPT.from_pretrained("tiny")
    model.save_pretrained(folder / "path" / "to" / "gpt2")
    save_tokenizer(tokenizer, folder / "path" / "to" / "gpt2")
    (folder / "my.json").write_text(json.dumps(load_examples("tiny")[:30]))
    return folder


def test_the_readme_holds_commands_and_they_start_with_the_two_that_matter():
    found = [command for command, _ in commands()]
    assert found[:2] == ["pip install -r requirements.txt", "python finetune.py"] and len(found) > 20


def test_every_command_runs(place, monkeypatch, capsys):
    true = load_examples
    monkeypatch.chdir(place)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for module in (data, finetune):  # each command's work cut short, its way unchanged
        monkeypatch.setattr(module, "load_examples", lambda path: true(path)[:40])
    ran = 0
    for command, comment in commands():
        words = [w for w in shlex.split(command) if not re.match(r"[A-Z_]+=", w)]
        scripts = [i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"]
        if NEEDS.search(comment) or words[0] in ("pip", "uv") or words[scripts[0]] in ELSEWHERE:
            continue
        script, flags = words[scripts[0]], words[scripts[0] + 1:]
        if script == "finetune.py":
            flags += ["--max-steps", "2"] * ("--max-steps" not in flags) + ["--overwrite"] * ("--resume" not in flags)
        monkeypatch.setattr(sys, "argv", [script, *flags])
        try:
            code = SCRIPTS[script](flags)
        except SystemExit as end:  # --help
            code = end.code
        assert code in (None, 0), f"{command}: exit code {code}: {capsys.readouterr().err}"
        ran += 1
    assert ran > 10


def test_its_python_runs(place, monkeypatch, capsys):
    true = load_examples
    monkeypatch.chdir(place)
    monkeypatch.setattr(finetune, "load_examples", lambda path: true(path)[:40])
    notebook, loop = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    exec(notebook.replace('"--out"', '"--max-steps", "2", "--out"'), {})
    assert (place / "runs" / "notebook" / "model" / "config.json").exists()

    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=12, n_head=1, n_embd=8))
    batches = [torch.randint(50, (2, 9)) for _ in range(3)]
    loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    names = {"model": model, "batches": batches, "loss": loss, "torch": torch}
    exec(loop, names)
    assert {n.split(".")[0] for n in names["plan"].trainable} == {"h", "ln_f"} and names["plan"].checks["check_unchanged"] == 1
    with pytest.raises(freeze.FreezeError, match="has no gradient|should have trained"):
        exec(loop.replace(".backward()", ""), names)


def test_the_rows_of_its_tables_are_commands_that_parse():
    rows = re.findall(r"^\|[^|]*\| `(--[^`]+)` \|", README, re.M)
    assert len(rows) > 5
    for row in rows:
        finetune.parse_args(shlex.split(row))


def test_every_file_it_names_is_there():
    names = set(re.findall(r"`((?:tests/|tiny/)\w+\.\w+|\w+\.py)`", README)) - {"bench.py", "convert_hf_to_gguf.py"}
    assert len(names) > 6 and not [n for n in names if not (ROOT / n).exists()]


def test_the_scripts_ask_uv_for_the_versions_of_requirements_txt():
    pinned = [line for line in (ROOT / "requirements.txt").read_text().split() if not line.startswith("pytest")]
    for script in SCRIPTS:
        head = (ROOT / script).read_text(encoding="utf-8").splitlines()[:4]
        assert head == ["# /// script", '# requires-python = ">=3.11"', f"# dependencies = {json.dumps(pinned)}", "# ///"], script
