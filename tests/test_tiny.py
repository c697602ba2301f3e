"""The embedded data and model: answers verified by code, tokens as tiktoken gives them, facts that are known."""

import importlib.util
import json
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import format_prompt, load_examples, load_tokenizer, split_examples
from gpt import GPT, generate, read_safetensors

TINY = ROOT / "tiny"
FACTS = ["capital", "plural", "past_tense", "opposite", "category", "conversion", "arithmetic", "spelling", "counting",
         "comparison", "neighbor"]  # tasks whose answer is true whatever the input


def script(name):
    """A script of tiny/ as a module."""
    spec = importlib.util.spec_from_file_location(name, TINY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make():
    return script("make")


@pytest.fixture(scope="module")
def records():
    return json.loads((TINY / "instructions.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY / "model")


@pytest.fixture(scope="module")
def model():
    return GPT.from_pretrained(TINY / "model").float().eval()


# ---- records ----


def test_every_answer_is_right_and_every_draft_is_wrong(make, records):
    make.verify(records)
    assert len(records) == 4500


def test_a_wrong_answer_a_right_draft_and_a_repeated_question_are_found(make, records):
    record = records[0]
    for broken, message in [({**record, "output": record["draft"]}, "wrong answer"),
                            ({**record, "draft": record["output"]}, "draft is right"),
                            ({**record, "instruction_long": "Do something else."}, "asks something else"),
                            ({**record, "level": 4}, "level 4")]:
        with pytest.raises(ValueError, match=message):
            make.verify([broken])
    with pytest.raises(ValueError, match="asked twice"):
        make.verify([record, record])


def test_the_answer_of_another_record_is_wrong(make, records):
    by_task = {}
    for record in records:
        by_task.setdefault(record["task"], []).append(record)
    for task, group in by_task.items():
        for one, two in zip(group, group[1:]):
            if one["output"] != two["output"]:
                assert not make.is_right(one, two["output"]), (one, two["output"])


@pytest.mark.parametrize("task, instruction, input, right, wrong", [
    ("capital", "What is the capital of Peru?", "", "The capital of Peru is Lima.", "The capital of Peru is Quito."),
    ("plural", "Write the plural of mouse.", "", "The plural of mouse is mice.", "The plural of mouse is mouses."),
    ("past_tense", "How do we say go in the past?", "", "The past tense of go is went.", "The past tense of go is goed."),
    ("opposite", "Opposite of cold.", "", "The opposite of cold is hot.", "The opposite of cold is wet."),
    ("category", "What is an owl?", "", "An owl is a kind of bird.", "An owl is a kind of tree."),
    ("conversion", "Convert 3 feet to inches.", "", "3 feet are 36 inches.", "3 feet are 30 inches."),
    ("arithmetic", "What is 32 minus 5?", "", "32 minus 5 is 27.", "32 minus 5 is 37."),
    ("sorting", "Sort.", "The numbers are 10, 9.", "In order the numbers are 9, 10.", "In order the numbers are 10, 9."),
    ("spelling", "Spell the word pea.", "", "The word pea is spelled p e a.", "The word pea is spelled p a e."),
    ("counting", "Count the letters of pea.", "", "The word pea has 3 letters.", "The word pea has 4 letters."),
    ("passive", "Passive!", "The cat bit the old dog.", "The old dog was bitten by the cat.", "The cat was bitten by the old dog."),
    ("typo", "Fix it.", "We like the hosue.", "We like the house.", "We like the hosue."),
    ("comparison", "Which is smaller, a pig or an ant?", "", "An ant is smaller than a pig.", "A pig is smaller than an ant."),
    ("comparison", "Which is larger, 19 or 21?", "", "21 is larger than 19.", "19 is larger than 21."),
    ("neighbor", "Which day is before Monday?", "", "The day before Monday is Sunday.", "The day before Monday is Tuesday."),
    ("reading", "Who has the cup?", "Ben has the red cup. Tom has the blue hat.", "Ben has the cup.", "Tom has the cup."),
    ("negation", "Negate.", "Tom likes tea today.", "Tom does not like tea today.", "Tom does not likes tea today."),
])
def test_the_checker_of_each_task_agrees_with_answers_written_by_hand(make, task, instruction, input, right, wrong):
    record = {"task": task, "instruction": instruction, "input": input}
    assert make.is_right(record, right)
    assert not make.is_right(record, wrong)
    assert not make.is_right({**record, "instruction": "", "input": ""}, right), "right for a question not asked"


def test_regular_plurals_and_past_tenses_follow_the_rules_of_spelling(make):
    irregular = {"child", "man", "woman", "foot", "tooth", "goose", "mouse", "ox", "louse", "sheep", "deer", "fish", "person"}
    for noun, plural in make.PLURALS:
        if noun in irregular:
            continue
        rule = (noun + "es" if re.search(r"(s|x|ch|sh|ato|ero|cho)$", noun) else
                noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else
                re.sub("fe?$", "ves", noun) if noun.endswith(("f", "fe")) else noun + "s")
        assert plural == rule
    for verb, past in make.PASTS:
        if past.endswith("ed") and verb not in ("feed", "lead"):
            double = re.fullmatch(r"[^aeiou]*[aeiou][gpn]", verb)  # one short vowel: stop, plan, hug
            rule = (verb + verb[-1] + "ed" if double else verb + "d" if verb.endswith("e") else
                    verb[:-1] + "ied" if re.search(r"[^aeiou]y$", verb) else verb + "ed")
            assert past == rule


def test_no_word_has_two_answers(make):
    for words in ([word for pair in make.OPPOSITES for word in pair], [noun for noun, _ in make.PLURALS],
                  [verb for verb, _ in make.PASTS], [m for members in make.CATEGORIES.values() for m in members],
                  list(make.CAPITALS.values()), [bad for bad, _ in make.TYPOS]):
        assert [word for word, n in Counter(words).items() if n > 1] == []


def test_the_split_leaves_each_part_its_share_of_every_task(make):
    train, val, test = split_examples(load_examples("tiny"))
    for part, rows in (("train", train), ("val", val), ("test", test)):
        assert Counter(r["task"] for r in rows) == {name: make.PARTS[part] for name, task in make.TASKS.items() if task.asked}
        assert {r["level"] for r in rows} == {1, 2, 3}
    assert make.PARTS["test"] >= 30


def test_what_is_asked_in_one_part_is_not_answered_in_another(records):
    train, val, test = split_examples(records)
    for task in FACTS:
        answers = [{r["output"] for r in part if r["task"] == task} for part in (train, val, test)]
        assert not answers[2] & (answers[0] | answers[1]) and not answers[1] & answers[0], task
    inputs = [{(r["instruction"], r["input"]) for r in part} for part in (train, val, test)]
    assert not inputs[2] & (inputs[0] | inputs[1])


def test_the_file_is_what_the_script_makes(make, records):
    assert [r for r in make.make_records(123) if make.TASKS[r["task"]].asked] == records


def test_the_held_out_text_and_the_vocabulary_are_what_the_script_makes(make, tmp_path):
    assert make.make_heldout(123) == (TINY / "heldout.txt").read_text(encoding="utf-8")
    make.make_vocabulary(make.make_records(123), 123, 2048, tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (TINY / "model" / name).read_bytes()


# ---- text ----


def test_the_prompt_template_never_occurs_in_the_plain_text(make):
    rng = random.Random(0)
    text = (TINY / "heldout.txt").read_text(encoding="utf-8") + "".join(make.document(rng) for _ in range(500))
    assert text.isascii()
    for part in ("###", "Instruction:", "Response:", "Below is"):
        assert part in make.PREAMBLE and part not in text


def test_every_task_is_told_of_in_the_plain_text(make):
    rng = random.Random(0)
    text = " ".join(make.document(rng) for _ in range(3000))
    for name, task in make.TASKS.items():
        answers = [task.output.format(**task.draw(rng)) for _ in range(1000)]
        assert any(answer in text for answer in answers), name


# ---- vocabulary ----


def test_the_most_frequent_pair_is_merged_first_and_digits_never(make):
    assert make.train_bpe("aab aab aab ab", 4) == [("a", "b"), ("a", "ab"), ("\u0120", "aab"), ("\u0120", "ab")]
    assert make.train_bpe("ab 77 77 77 ab", 1) == [("a", "b")], "digits are left alone"


def test_the_trainer_s_own_encoding_is_tiktoken_s(make, records, tokenizer):
    symbols = make.byte_symbols()
    lines = (TINY / "model" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines]
    rank = {pair: i for i, pair in enumerate(merges)}
    vocab = json.loads((TINY / "model" / "vocab.json").read_text(encoding="utf-8"))

    def encode(text):
        ids = []
        for piece in make.PATTERN.findall(text):
            word = tuple(symbols[b] for b in piece.encode())
            while found := [pair for pair in zip(word, word[1:]) if pair in rank]:
                word = make.merge_pair(word, min(found, key=rank.get))
            ids += [vocab[token] for token in word]
        return ids

    texts = [r[key] for r in records[::40] for key in ("instruction_long", "input", "output", "rationale")]
    texts += [make.PREAMBLE, "  two  spaces\n\n\nand a tab\t it's  1234.5 %$ unknownword \n"]
    for text in texts:
        assert encode(text) == tokenizer.encode_ordinary(text)
        assert tokenizer.decode(encode(text)) == text


def test_the_vocabulary_is_complete_and_its_last_id_is_the_end_token(make, tokenizer):
    vocab = json.loads((TINY / "model" / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(2048)) and tokenizer.n_vocab == 2048
    assert vocab["<|endoftext|>"] == 2047 == tokenizer.eot_token
    assert all(not any(c.isdigit() for c in token) for token in vocab if len(token) > 1)


def test_transformers_gives_the_same_ids(records, tokenizer):
    transformers = pytest.importorskip("transformers")
    other = transformers.GPT2Tokenizer.from_pretrained(TINY / "model")
    for record in records[::100]:
        prompt = format_prompt(record)
        assert other(prompt)["input_ids"] == tokenizer.encode_ordinary(prompt)


# ---- model ----


def test_the_model_is_small_and_in_half_precision(model):
    assert sum(f.stat().st_size for f in (TINY / "model").iterdir()) <= 8_000_000
    tensors = read_safetensors(TINY / "model" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert all(t.isfinite().all() for t in tensors.values())
    assert model.config.block_size == 256 and model.config.vocab_size == 2048


def test_every_prompt_and_answer_fits_into_the_model(model, records, tokenizer):
    for r in records:
        ids = tokenizer.encode_ordinary(format_prompt({**r, "instruction": r["instruction_long"]}) + r["rationale"] + r["output"])
        assert len(ids) < model.config.block_size - 50


def test_the_base_model_knows_the_capitals_but_does_not_follow_instructions(make, model, records, tokenizer):
    known = 0
    for country, capital in make.CAPITALS.items():
        ids = tokenizer.encode_ordinary(f"The capital of {country} is")
        wanted = tokenizer.encode_ordinary(f" {capital}.")
        known += generate(model, [[tokenizer.eot_token, *ids]], len(wanted)) == [wanted]
    assert known >= 90
    test = split_examples(records)[2][::8]
    answers = generate(model, [tokenizer.encode_ordinary(format_prompt(r)) for r in test], 40, eos_id=tokenizer.eot_token)
    right = sum(tokenizer.decode(ids) == r["output"] for ids, r in zip(answers, test))
    assert right <= 0.05 * len(test)


def test_pretraining_writes_a_folder_that_loads(make, tmp_path, monkeypatch, capsys):
    shutil.copytree(TINY / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    monkeypatch.setattr(make, "HERE", tmp_path)
    make.pretrain(seed=1, n_tokens=1024, batch_size=2)
    assert "tokens/s" in capsys.readouterr().out
    assert GPT.from_pretrained(tmp_path / "model").config.n_layer == 4


# ---- experiments ----


@pytest.fixture(scope="module")
def experiments():
    return script("experiments")


@pytest.fixture(scope="module")
def base(experiments):
    return experiments.Base("tiny", "tiny")


def test_every_row_is_a_command_that_finetune_takes(experiments, base, tmp_path, monkeypatch):
    import finetune

    monkeypatch.setattr(base, "difficulties", [i / 4000 for i in range(len(base.train))])
    monkeypatch.setattr(experiments, "random_model", lambda folder: folder)
    for table, (_, epochs, columns, rows) in experiments.TABLES.items():
        assert set(columns) <= set(experiments.COLUMNS), table
        for name, template in rows.items():
            flags = experiments.fill(template, base, epochs, tmp_path)
            for script, *line in experiments.commands(flags, "tiny", [], "out", 1):
                args = finetune.parse_args(line) if script == "finetune.py" else None
                assert args is None or args.seed in (1, 10) and args.epochs and (epochs >= 1 or args.max_examples or args.max_steps), name


def test_rows_of_equal_budget_train_on_as_many_response_tokens(experiments, base):
    for flags in ("--max-examples 50 --select longest", "--max-examples 50 --select shortest", "", "--response reflection"):
        steps = base.steps_for(10_000, flags.split())
        encoded = base.training("reflection" if "reflection" in flags else None)
        if "select" in flags:
            encoded = sorted(encoded, key=lambda e: (len(e.ids) - e.n_prompt) * (-1 if "longest" in flags else 1))[:50]
        per_step = experiments.count_targets(encoded) / -(-len(encoded) // 16)
        assert abs(steps * per_step - 10_000) <= per_step / 2, flags
    run = {"base": base, "flags": {"response": None}, "metrics": [{"records": [0, 1]}, {}, {"records": [0]}]}
    first, second = (experiments.count_targets(base.encode(base.train[i:i + 1])) for i in (0, 1))
    assert experiments.trained_targets(run) == 2 * first + second


def test_below_one_epochs_is_the_share_of_the_records(experiments, base, tmp_path):
    assert experiments.fill("--trainable all", base, 0.25, tmp_path) == "--trainable all --max-examples 956 --epochs 1"
    assert experiments.fill("--max-examples {half} --epochs 2", base, 0.25, tmp_path) == "--max-examples 478 --epochs 2"
    assert experiments.fill("", base, 3, tmp_path) == "--epochs 3"
    assert experiments.fill("--max-examples {n} --epochs 2 --max-steps {staged}", base, 0.25, tmp_path).endswith("--max-steps 64")  # 20, 20, 24
    assert experiments.fill("{all_tokens}", base, 0.25, tmp_path) == "--epochs 999 --max-steps 240"
    with pytest.raises(SystemExit):
        experiments.main(["layers", "--epochs", "1.5"])


def test_a_chain_of_adapters_is_merged_between_and_goes_on_with_new_ones(experiments):
    first, merge, second = experiments.commands("--lora-r 8 then --lora-r 4", "tiny", ["--epochs", "1"], "out", 2)
    assert first == ["finetune.py", "--lora-r", "8", "--epochs", "1", "--seed", "2", "--out", "out.part1"]
    assert merge == ["lora.py", "merge", "--base", "tiny", "--adapter", "out.part1/adapter", "--out", "out.merged1"]
    assert second == ["finetune.py", "--model", "out.merged1", "--lora-r", "4", "--epochs", "1", "--seed", "20", "--out", "out"]


def test_statistics_of_the_tables_agree_with_hand_computed_ones(experiments):
    assert experiments.spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert experiments.spearman([3, 2, 1], [1, 2, 3]) == pytest.approx(-1)
    assert experiments.spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1) and experiments.spearman([1, 1], [1, 2]) is None
    assert experiments.undominated([(1, 5), (2, 4), (2, 5), (2, 4)]) == [True, True, False, True]
    metrics = [{"step": 0, "val_loss": 1.0}, {"step": 5, "val_loss": None}, {"step": 10, "val_loss": 0.5}, {"step": 20, "val_loss": 0.1}]
    assert experiments.steps_to(0.75, metrics) == 5 and experiments.steps_to(0.1, metrics) == 20
    assert experiments.steps_to(0.05, metrics) is None
    assert experiments.cell([1.0, 2.0, 3.0], 10, 1) == "20.0 ± 5.8" and experiments.cell([0.5], 1, 2) == "0.50"
    assert experiments.cell([1.0, None], 1, 1) == "-" == experiments.cell([], 1, 1)


@pytest.mark.parametrize("policy, lora_r, share", [("all", None, 1), ("last:1", None, None), ("biases", None, 2 / 3), ("lora", 8, None)])
def test_the_cost_model_is_that_of_the_closed_form(experiments, policy, lora_r, share):
    from freeze import freeze
    from lora import add_lora

    model = GPT.from_pretrained("tiny")
    block, head, adapters = 12 * 192 ** 2, 2048 * 192 / 4, 0
    if lora_r:
        add_lora(model, r=lora_r)
        adapters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    cost = experiments.needed(model, freeze(model, policy), 0.25)
    full = 3 * (4 * block + head)
    if policy == "last:1":
        assert cost == pytest.approx((3 + 3) * block + 2 * head)  # forward in three, all three products in one; the head is frozen
    elif lora_r:
        assert cost == pytest.approx(full * 2 / 3 + 3 * adapters)
    else:
        assert cost == pytest.approx(full * share)


def fake_result(n_trainable, nll, forgetting, responses=(), prompt_tokens=10, scores=None):
    run = {"freeze": {"trainable_parameters": n_trainable, "scores": scores or {}}, "metrics": [], "responses": responses,
           "train": {"prompt_tokens": prompt_tokens, "train_loss": 1.0, "val_loss": 1.0, "steps": 5, "seconds": 1.0, "peak_memory_bytes": 1},
           "flags": {}}
    return run, {"exact_match": 0.5, "response_nll": nll, "forgetting": forgetting, "saved_bytes": 1}


def test_a_row_that_fails_is_named_and_the_others_are_printed(experiments, tmp_path, monkeypatch, capsys):
    def run_row(lines, text, base):
        return None if "1e-4" in lines[0] and lines[0][-3] == "2" else fake_result(7, 0.25, 0.125)
    monkeypatch.setattr(experiments, "run_row", run_row)
    assert experiments.main(["rates", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "One pass over 956 records unless the row says otherwise; 3 seeds (--seed 1 to 3), mean ± standard error; scored by" in out
    assert "| full, lr 1e-4 | - | - | - | - | `python finetune.py --trainable all --lr 1e-4 --max-examples 956 --epochs 1 --seed 1 --out runs/rates-1` |" in out
    assert "| LoRA, lr 3e-3 | 7 | 50.0 | 0.250 | 0.125 | `python finetune.py --lora-r 8 --max-examples 956 --epochs 1 --seed 1 --out runs/rates-6` |" in out
    assert err.splitlines()[-1] == "error: not finished: full, lr 1e-4, hybrid, lr 1e-4 and 1e-3; run the table again"
    assert experiments.main(["rates", "--out", str(tmp_path), "--seeds", "1", "--epochs", "2"]) == 0
    assert "2 passes over all records unless the row says otherwise; 1 seed; scored by" in capsys.readouterr().out


def test_a_row_is_resumed_scored_once_and_left_alone_where_its_command_fails(experiments, tmp_path, monkeypatch):
    out, started = tmp_path / "row", []

    def run(command, code=0, **_):
        started.append([Path(command[1]).name, *command[2:]])
        if code == 0:
            out.mkdir(exist_ok=True)
            (out / ("run.json" if "finetune" in str(command[1]) else "scores.json")).write_text('{"forgetting": 0.5}')
            for name in ("metrics.jsonl", "responses.jsonl"):
                (out / name).write_text("{}\n")
        return type("Done", (), {"returncode": code})
    line = ["finetune.py", "--lora-r", "8", "--out", str(out)]
    monkeypatch.setattr(experiments.subprocess, "run", lambda *a, **k: run(*a, code=1))
    assert experiments.run_row([line], None, None) is None  # another process holds the folder, say
    assert started.pop() == [*line, "--overwrite"] and not started
    (out / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(experiments.subprocess, "run", run)
    assert experiments.run_row([line], "story.txt", None)[1]["forgetting"] == 0.5
    assert started == [[*line, "--resume"], ["evaluate.py", out, "--text", "story.txt"]]
    assert experiments.run_row([line], "story.txt", None)[0]["metrics"] == [{}] and len(started) == 2


def test_the_norms_are_compared_with_the_blocks_trained_alone(experiments, base, capsys):
    scores = {"rgn:2": [0.4, 0.1, 0.2, 0.3]}
    results = {"2 of largest relative gradient norm": [fake_result(1, 0.1, 0, scores=scores)]}
    results |= {f"block {i} alone": [fake_result(1, nll, 0)] for i, nll in enumerate([0.1, 0.4, 0.3, 0.2])}
    experiments.after_layers(results, base)
    assert "training each block alone (1: the norms tell the best block): 1.00" in capsys.readouterr().out
    results["block 0 alone"] = [fake_result(1, 0.9, 0)]
    experiments.after_layers(results, base)
    assert "the best block): -0.20" in capsys.readouterr().out


def test_adaptive_instructions_help_only_if_they_are_shorter_and_no_quartile_is_worse(experiments, base, monkeypatch, capsys):
    monkeypatch.setattr(base, "test", base.test[:8])
    monkeypatch.setattr(base, "difficulty", lambda encoded: list(range(8)))
    answers = lambda wrong: [{"ended": True, "model_response": "b" if i in wrong else "a", "output": "a"} for i in range(8)]
    row = lambda wrong, tokens: [fake_result(1, 0.1, 0, answers(wrong), tokens)] * 3
    for adaptive, verdict in ((row({}, 70), "help: 30%"), (row({}, 80), "do not help: 20%"), (row({7}, 70), "do not help: 30%")):
        experiments.after_instructions({"short": row({}, 50), "long": row({}, 100), "adaptive": adaptive}, base)
        out = capsys.readouterr().out
        assert f"Adaptive instructions {verdict} fewer prompt tokens" in out
        assert ("worse by more than a standard error in quartile 4." in out) == (adaptive == row({7}, 70))
    assert "| adaptive | 100.0 | 100.0 | 100.0 | 50.0 | 70.0 |" in out
