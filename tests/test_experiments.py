"""experiments/: scores against plain loops, forms byte for byte, commands, tables end to end."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "tiny")]
import choose_layers, evaluate, finetune, freeze, gpt, lora, make, shape_data, tables  # noqa
from data import Encoded, collate, copy_tokenizer, encode_examples, load_parts  # noqa: E402

SCRIPTS = {"finetune.py": finetune, "lora.py": lora, "evaluate.py": evaluate,
           "experiments/choose_layers.py": choose_layers, "experiments/shape_data.py": shape_data}

@pytest.fixture(scope="module")
def here(tmp_path_factory):  # a random model of two blocks with tiny's tokenizer, 20 of its records
    folder = tmp_path_factory.mktemp("a b")
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(2048, block_size=128, n_layer=2, n_head=2, n_embd=16))
    model.wte.weight.data *= 20  # its predictions differ from place to place
    model.save_pretrained(folder / "model")
    copy_tokenizer(ROOT / "tiny" / "model", folder / "model")
    (folder / "records.json").write_text(json.dumps(load_parts("tiny").train[:20]))
    return folder

def plain_loss(model, batch):
    inputs, targets = collate(batch)
    return torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

policy_of = lambda command: choose_layers.choose(choose_layers.parse_args(shlex.split(command)[2:]))

def run(command):  # what tables.execute does, in this process
    command = re.sub(r"\$\((.*?)\)", lambda match: policy_of(match[1]), command)
    return SCRIPTS[shlex.split(command)[1]].main(shlex.split(command)[2:])

def test_scores_are_those_of_plain_loops_and_of_the_closed_form(here, monkeypatch):
    model = gpt.GPT.from_pretrained(here / "model")
    batches = [[Encoded(torch.randint(2048, (n,)).tolist(), n // 2) for n in batch]
               for batch in ([9, 4], [20])]
    losses, norm = [plain_loss(model, batch) for batch in batches], torch.nn.utils.get_total_norm
    grads = lambda loss, of: torch.autograd.grad(loss, list(of), retain_graph=True)
    plain = [sum(norm(grads(loss, block.parameters())) for loss in losses).item()
             / norm(block.parameters()).item() / 2 for block in model.h]
    assert choose_layers.relative_gradient_norms(model, batches) == pytest.approx(plain, rel=1e-4)
    shortfalls = choose_layers.rank_shortfalls(model, batches, r=3)
    for name, p in [(f"h.{n}", p) for n, p in model.h.named_parameters() if p.dim() == 2]:
        [g] = grads(sum(losses) / 2, [p])
        u, s, v = torch.linalg.svd(g)
        rest = (g - (u[:, :3] * s[:3]) @ v[:3]).norm() ** 2 / g.norm() ** 2
        assert shortfalls.pop(name) == pytest.approx((rest * g.norm() / p.norm()).item(), rel=1e-3)
    assert not shortfalls
    s = [10, 3, 2, 1.9, 1.42, 1, 0.8, 0.6]  # quartiles 0.95 and 2.25: thresholds 1.93 and 1.45
    for n, above in (8, 3), (32, 4):
        u, v = (torch.linalg.qr(torch.randn(size, 8))[0] for size in (8, n))
        for weight in (u * torch.tensor(s) @ v.T, v * torch.tensor(s) @ u.T):
            expected = sum(s[:above]) / sum(s[above:]) / 10
            assert choose_layers.signal_to_noise(weight) == pytest.approx(expected, rel=1e-4)
    planted = iter([5, 5, 9, 1, 4, 6, 9, 2])  # block 0 has more, less, as much, and less
    monkeypatch.setattr(choose_layers, "signal_to_noise", lambda weight: next(planted))
    assert choose_layers.spectrum_ranks(model) == [0.25, 0.5]

def test_a_hybrid_trains_the_matrices_that_fit_and_the_adapters_of_the_others(here):
    model = gpt.GPT.from_pretrained(here / "model")
    scores = {"h.0.mlp.c_fc.weight": 3.0, "h.1.attn.c_attn.weight": 2.0,  # 1,024 and 768 parameters
              "h.0.attn.c_proj.weight": 1.0, "h.1.attn.c_proj.weight": 0.0}  # 256 each
    share = 1600 / sum(p.numel() for p in model.parameters())  # the second one is passed over
    policy, own = choose_layers.hybrid(model, scores, share), ("h.0.mlp.c_fc.", "h.0.attn.c_proj.")
    lora.add_lora(model, r=2)
    rest = {n for n, _ in model.named_parameters() if "lora_" in n and not n.startswith(own)}
    assert len(rest) == 12 and freeze.resolve(model, policy) == rest | {f"{n}weight" for n in own}
    with pytest.raises(ValueError, match="no matrix"):
        choose_layers.hybrid(model, scores, share / 7)

def test_the_policy_is_that_of_the_largest_scores(here, capsys, monkeypatch):
    monkeypatch.chdir(here)
    start = "python experiments/choose_layers.py --model model --data records.json"
    for by in ("rgn --k 1", "spectrum --k 1", "random --k 1", "shortfall --share 0.03 --lora-r 1"):
        assert run(f"{start} --by {by} --verbose") == 0
        out, err = capsys.readouterr()
        best = max(err.splitlines(), key=lambda line: float(line.split()[1])).split(":")[0]
        assert re.match(rf"(lora,|blocks:){best}\b", out) and len(out.split()) == 1
    drawn = {policy_of(f"{start} --by random --k 1 --seed {seed}") for seed in range(9)}
    assert drawn == {"blocks:0", "blocks:1"} and run(f"{start} --by random --k 3") == 1
    seen, norms = [], "relative_gradient_norms"
    monkeypatch.setattr(choose_layers, norms, lambda model, batches: seen.extend(batches) or [1])
    assert policy_of("python choose_layers.py --by rgn --k 1") == "blocks:0"
    assert [len(batch) for batch in seen] == [16] * 5

RECORD = {"instruction": "Add.", "input": "1, 2", "output": " 3\n", "instruction_long": "Add up.",
          "rationale": "1 + 2 = 3.", "draft": "4", "level": 2}
SOLVED = {"instruction": "Q", "input": "", "output": "a\nb\n#### 72\n"}  # as GSM8K has it

@pytest.mark.parametrize("record, form, response, changed", [
    (RECORD, "long", "answer", {"instruction": "Add up.", "output": "3"}),
    (RECORD, "short", "rationale", {"output": "1 + 2 = 3.\nAnswer: 3"}),
    (RECORD, "short", "reflection", {"output": "4\nThat is wrong. 1 + 2 = 3.\nAnswer: 3"}),
    (SOLVED, "short", None, {}), (SOLVED, "short", "answer", {"output": "72"}),
    (SOLVED, "short", "rationale", {"output": "a\nb\nAnswer: 72"}),
    ({**RECORD, "output": "x\n#### A\nb"}, "short", "answer", {})])
def test_forms_are_these_byte_for_byte(record, form, response, changed):
    assert shape_data.reshape(record, form, response) == record | changed
    for missing in ("long", None), ("short", "reflection"):
        with pytest.raises(ValueError, match="'Q' has no text as (instruction_long|draft)"):
            shape_data.reshape(SOLVED | {"draft": " "}, *missing)

def test_selection_and_stages_take_these():
    scores = [0.5, 2.0, 0.25, 3.0, 0.5]
    for how, n, chosen in ((None, 2, [0, 1]), ("longest", 2, [1, 3]), ("shortest", 2, [0, 2]),
                           ("random", 1, [2]), ("ifd", 2, [0, 4])):
        assert shape_data.select(scores, how, n) == chosen
        with pytest.raises(ValueError, match="only (3|5) "):
            shape_data.select(scores, how, 4 if how == "ifd" else 6)
    scores = [float(7 * i % 68) for i in range(68)]
    for reverse in (False, True):
        first, second, last = shape_data.split_stages(scores, 3, reverse, seed=1)
        order, repeated = first + second + last[:23], last[23:]
        assert [scores[i] for i in order] == sorted(scores, reverse=reverse) and len(second) == 23
        assert len(repeated) == len(set(repeated)) == 4 and set(repeated) <= {*first, *second}
        assert repeated != shape_data.split_stages(scores, 3, reverse, seed=2)[-1][23:]
    by = lambda how, seed, *records: shape_data.measure(records, how, None, None, seed)
    assert by("level", 1, RECORD, {"level": 1}) == [2, 1]
    assert by("random", 1, {}) != by("random", 2, {})
    with pytest.raises(ValueError, match="no number as level"):
        by("level", 1, RECORD, SOLVED)

def test_difficulty_and_uncertainty_are_those_of_plain_loops(here):
    model, tokenizer = gpt.load_model(here / "model", "cpu")
    records = load_parts(here / "records.json").train
    long = [RECORD | {field: "a " * 99} for field in ("input", "output")]  # no room, and cut
    ifd = shape_data.measure([*records, *long], "ifd", model, tokenizer, 0)
    assert ifd[-2:] == [float("inf")] * 2
    for record, score, h in zip(records, ifd, shape_data.entropies(model, tokenizer, records)):
        [example], _ = encode_examples([record], tokenizer)
        alone = Encoded([2047, *example.ids[example.n_prompt:]], 1)
        ratio = (plain_loss(model, [example]) - plain_loss(model, [alone])).exp()
        p = model(torch.tensor([example.ids[:example.n_prompt]]))[0, -1].softmax(-1)
        assert (score, h) == pytest.approx((float(ratio), -float((p * p.log()).sum())), rel=1e-4)

def test_adaptive_forms_go_by_the_loss_but_in_the_test_part_by_uncertainty_alone(monkeypatch):
    form = lambda kind, *numbers: [{"kind": kind, "loss": loss, "unsure": h} for loss, h in numbers]
    short = {"train": form("s", (1, 0), (1.04, 0), (1.06, 0)), "test": form("s", (9, 3), (0, 4)),
             "val": form("s", (1, 1), (1, 2), (2, 0), (1, 3))}  # three quarters lie below 3
    long = {part: form("l", (1, 0), (1, 0), (1, 0), (1, 0))[:len(short[part])] for part in short}
    read = lambda key: lambda model, tokenizer, examples: [e[key] for e in examples]
    monkeypatch.setattr(shape_data, "nats_per_token", read("loss"))
    monkeypatch.setattr(shape_data, "entropies", read("unsure"))
    adapted = shape_data.adapt(None, None, short, long)
    assert ["".join(e["kind"] for e in adapted[part]) for part in short] == ["ssl", "sl", "ssls"]

@pytest.mark.parametrize("table", tables.COLUMNS)
def test_every_command_of_a_table_is_in_the_readme_and_its_script_takes_it(table):
    base = SimpleNamespace(model="tiny", data="tiny", out="runs/tables", text="tiny/heldout.txt",
                           batch_size=16, tokens_of=lambda data: dict.fromkeys(range(3825), 1))
    readme = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    assert table != "layers" or len(tables.rows_of(table, 8)) == 10 + 8 + 6 + 5 + 2
    for label, templates in (tables.rows_of(table, 8) | tables.rows_of(table, 4)).items():
        for template in templates:
            filled = tables.fill(template, base, f"{table}-{label}", 1)
            for command in [filled, *re.findall(r"\$\((.*?)\)", filled)]:
                _, script, *flags = shlex.split(re.sub(r"\$\(.*?\)", "blocks:0", command))
                merges = flags[:1] + flags[1::2] == "merge --base --adapter --out".split()
                assert merges if script == "lora.py" else SCRIPTS[script].parse_args(flags)
            if label in tables.rows_of(table, 4) and "steps}" not in template:
                assert f"\n{filled}\n" in readme

def test_a_table_goes_on_where_it_was_stopped(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROWS", {"length": {
        "chain": tables.ROWS["ranks"]["the same, merged and begun anew"],
        "solved": tables.ROWS["instructions"]["worked solution, answer"],
        "staged": tables.ROWS["stages"]["by level"], "bad": "--trainable last:3"}})
    done, out, source, real = [], tmp_path / "out", here / "records.json", tables.execute
    flags = ["length", "--seeds", "2", "--out", str(out), "--text", "LICENSE",
             "--model", str(here / "model"), "--data", str(source)]
    def execute(command):
        done.append(command)
        if len(done) == 9:
            raise KeyboardInterrupt
        return run(command)
    monkeypatch.setattr(tables, "execute", execute), monkeypatch.chdir(here)
    assert tables.main(flags) == 130 and (out / "length-chain-seed2" / "scores.json").exists()
    assert tables.main(flags) == 1 and len(done) == 26 and len(set(done)) == 25  # one comes twice
    printed, err = capsys.readouterr()
    rows = {line.split(" | ")[0]: line.split(" | ") for line in printed.splitlines()}
    assert "not finished: length: bad" in err and rows["| bad"][1:] == ["-"] * 4 + ["- |"]
    assert rows["| chain"][1] == "2" and "\n# staged\npython experiments/shape_data.py " in printed
    base = tables.load_base(str(here / "model"), str(source), str(source), str(out))
    parts, source = load_parts(out / "length-staged-seed1-data" / "stage3"), load_parts(source)
    assert rows["| staged"][1] == "3" and len(parts.train) == 2
    assert all(e in source.train for e in parts.train) and parts[1:3] == source[1:3]
    (out / "length-bad-seed1").mkdir()
    (out / "length-bad-seed1" / "checkpoint.pt").touch()
    assert tables.run_row(tables.rows_of("length", 2)["bad"], base, "length-bad", 1)[1] == []
    assert done[-1].endswith(" --resume") and done[-2].endswith(" --overwrite")
    (tmp_path / "a.py").write_text("import sys; sys.exit(len(sys.argv))")
    monkeypatch.setenv("PATH", "")  # commands run with this Python
    assert real(f"python {tmp_path}/a.py one two") == 3
    own = shape_data.measure(source.train, "length", None, base.tokenizer, 0)
    assert list(base.tokens_of(base.data).values()) == [n + 1 for n in own]
    known = {base.data: dict.fromkeys(range(100), 10), "x": dict.fromkeys(range(40), 5)}
    base.tokens_of = known.get
    for key, flags in ("", "--epochs 2 --max-steps 4"), ("all_", "--epochs 5 --max-steps 15"):
        assert tables.fill(f"{{{key}steps}} --data x", base, "", 1).endswith(f" {flags} --data x")

def test_cells_and_points_are_means_with_their_standard_errors(monkeypatch):
    assert tables.cell([1.0, 2.0, 3.0], 1) == "2.0 ± 0.6" and tables.cell([1.0, None], 1) == "-"
    assert tables.cell([0.5], 2) == "0.50" and tables.cell([4, 4], 0) == "4"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", figure := mock.MagicMock())
    seeds = [{"forgetting": x, "exact match %": y} for x, y in ((0.1, 50), (0.2, 70), (0.3, 90))]
    tables.draw({"ranks: LoRA r = 8": seeds, "ranks: full": seeds}, "x.png")
    [point] = figure.Figure().subplots().errorbar.call_args_list
    assert point.args[:4] == pytest.approx((0.2, 70, 20 / 3**0.5, 0.1 / 3**0.5))

def test_the_base_is_made_anew_byte_for_byte_and_deeper_ones_of_the_same_text(tmp_path):
    shutil.copytree(ROOT / "tiny" / "model", tmp_path / "model")
    make.main(["--only", "instructions", "heldout", "model", "--layers", "5", "--tokens", "8192",
               "--out", str(tmp_path)])
    for name in "instructions.json", "heldout.txt":
        assert (tmp_path / name).read_bytes() == (ROOT / "tiny" / name).read_bytes()
    assert gpt.load_model(tmp_path / "model")[0].config.n_layer == 5
