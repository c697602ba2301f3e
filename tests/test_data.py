"""data.py: records in, prompts, ids, batches out; tokenizer files in both directions."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import tiktoken
import torch

import data
from data import IGNORE_INDEX, Encoded, batches, collate, encode_example, encode_examples, format_prompt
from data import load_examples, load_tokenizer, save_tokenizer, split_examples, token_weights

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data beside the project")
EOT = "<|endoftext|>"
MERGES = [("l", "l"), ("h", "e"), ("Ġ", "he"), ("he", "ll"), ("hell", "o"), ("Ġhe", "ll")]
TEXTS = ["", " ", "hello hello", "a\r\nb\n\n\n", "it's 1234567", "naïve 東京 👩‍👩‍👧 \u2028\x00", "x" * 3000,
         f"a {EOT} b", "<|im_start|>user", "\t\t  def f():\n    return  1 ", "ʼn'LL 'll"]


def write_tokenizer(folder, vocab=None, merges=MERGES):
    """Ids are byte values, then merges, then the end token: so ids can be read as ASCII codes."""
    folder.mkdir(parents=True, exist_ok=True)
    if vocab is None:
        vocab = {char: byte for byte, char in data.BYTE_TO_CHAR.items()}
        vocab |= {a + b: 256 + n for n, (a, b) in enumerate(merges)}
        vocab[EOT] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in merges), ""]), encoding="utf-8")
    return vocab


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Bytes alone: a text's ids are its UTF-8 bytes, 256 ends it."""
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder, merges=[])
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def gpt2():
    return load_tokenizer(SHARED / "gpt2")


def load(tmp_path, content, name="records.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_examples(path)


# ---------------------------------------------------------------- records

ONE = {"instruction": "Add.", "input": "1 1", "output": "2"}
TURN = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize("record, expected", [
    (ONE, ONE),
    ({"instruction": "Add.", "output": "2"}, ONE | {"input": ""}),
    ({"instruction": "Add.", "input": None, "output": "2"}, ONE | {"input": ""}),
    ({"task": "sum", "level": 2} | ONE, ONE | {"task": "sum", "level": 2}),
    ({"prompt": "Add.", "completion": "2"}, ONE | {"input": ""}),
    ({"question": "Add.", "answer": "2", "id": 7}, ONE | {"input": "", "id": 7}),
    ({"messages": TURN, "source": "x"}, ONE | {"input": "", "source": "x"}),
    ({"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "2"}]}, ONE | {"input": ""}),
    ({"messages": [{"role": "system", "content": "Be brief."}, *TURN]},
     {"instruction": "Be brief.\n\nAdd.", "input": "", "output": "2"}),
    ({"conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "Add."}, {"from": "gpt", "value": "2"}]},
     ONE | {"input": ""}),
    ({"prompt": None, "completion": None, "question": "Add.", "answer": "2", "messages": None, "id": None}, ONE | {"input": "", "id": None}),
])
def test_every_accepted_record_becomes_instruction_input_output_and_keeps_its_other_keys(tmp_path, record, expected):
    for text in (json.dumps([record]), json.dumps([record], indent=2), json.dumps(record)):
        (example,) = load(tmp_path, text)
        assert example == expected and list(example)[:3] == ["instruction", "input", "output"]


def test_lines_may_have_a_byte_order_mark_windows_ends_and_blanks_and_unusual_separators_in_text(tmp_path):
    rows = [ONE, ONE | {"output": "a\u2028b"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for joined in ("\ufeff" + "\r\n".join(lines) + "\r\n", "\n\n" + lines[0] + "\n \n\n" + lines[1], "\ufeff\n" + "\n".join(lines)):
        assert load(tmp_path, joined, "records.txt") == rows
    assert load(tmp_path, "\ufeff \r\n" + json.dumps(rows), "records.jsonl") == rows


def test_json_lines_are_read_one_at_a_time(tmp_path, monkeypatch):
    longest = []
    parse = data._parse
    monkeypatch.setattr(data, "_parse", lambda text, where: longest.append(len(text)) or parse(text, where))
    load(tmp_path, "\n".join([json.dumps(ONE)] * 50))
    assert len(longest) == 50 and max(longest) <= len(json.dumps(ONE)) + 1


@pytest.mark.parametrize("content, needle", [
    (b"", "empty"),
    (b"\xef\xbb\xbf \n", "empty"),
    (b"[]", "no records"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    (b"<!DOCTYPE html><html>", "web page"),
    (b"\x1f\x8b\x08\x00\x00", "gunzip"),
    (b"\x00\x01\x02", "begins with"),
    (b"\xff\xfe[\x00", "begins with"),
    (b"instruction,output\na,b\n", "begins with"),
    (b'[{"instruction": "a", "output": "b"}, {"instr', "not JSON"),
    (b'[{"instruction": "a\xff", "output": "b"}]', "not JSON in UTF-8"),
    (b'{\n "instruction": "a",\n "output": "b"\n}', "one record per line"),
    (b"[" * 100_000, "not JSON"),
])
def test_a_file_that_is_no_data_is_one_value_error_that_names_it(tmp_path, content, needle):
    with pytest.raises(ValueError, match="records.json") as caught:
        load(tmp_path, content)
    assert needle in str(caught.value) and len(str(caught.value)) < 400


USER, REPLY = TURN
BAD_RECORDS = [
    ("text", "object"),
    (["a", "b"], "object"),
    (None, "object"),
    ({}, "needed"),
    ({"instruction": "a", "response": "b"}, "response"),
    ({"instruction": "a"}, "output"),
    ({"instruction": "a", "output": None}, "output must be text"),
    ({"instruction": "a", "output": 7}, "output must be text"),
    ({"instruction": ["a"], "output": "b"}, "instruction must be text"),
    ({"instruction": "a", "input": 0, "output": "b"}, "input must be text"),
    ({"instruction": "a", "input": [], "output": "b"}, "input must be text"),
    ({"instruction": "a", "output": ""}, "output is empty"),
    ({"instruction": " ", "output": "b"}, "instruction is empty"),
    ({"prompt": "a", "completion": " \n"}, "completion is empty"),
    ({"question": "a", "answer": "b", "instruction": "c"}, "both question and instruction"),
    ({"prompt": "a", "completion": "b", "question": "a", "answer": "b"}, "both prompt and question"),
    ({"instruction": "a", "output": "b", "messages": TURN}, "both instruction and messages"),
    ({"messages": TURN, "conversations": TURN}, "both messages and conversations"),
    ({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " "}, REPLY]}, "question in messages is empty"),
    ({"instruction": "a", "output": "half \ud83d"}, "surrogate"),
    (ONE | {"note": "\udc00"}, "surrogate"),
    ({"messages": TURN * 2}, "multi-turn"),
    ({"messages": [REPLY, USER]}, "messages of assistant, user"),
    ({"messages": [USER]}, "messages of user"),
    ({"messages": [USER, {"role": "tool", "content": "x"}, REPLY]}, "tool"),
    ({"messages": []}, "nobody"),
    ({"messages": "hello"}, "list of objects"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "list of objects"),
    ({"messages": [USER, {"role": ["assistant"], "content": "x"}]}, "list of objects"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, "answer in messages is empty"),
    ({"conversations": None}, "list of objects"),
]


@pytest.mark.parametrize("record, needle", BAD_RECORDS)
def test_a_record_that_cannot_be_used_is_named_with_its_file_and_number(tmp_path, record, needle):
    with pytest.raises(ValueError) as caught:
        load(tmp_path, json.dumps([ONE, ONE, record]))
    assert "records.json: record 3: " in str(caught.value) and needle in str(caught.value)
    if isinstance(record, dict):
        with pytest.raises(ValueError, match=r"record 2 \(line 3\): "):
            load(tmp_path, f"{json.dumps(ONE)}\n\n{json.dumps(record)}\n")


def test_a_broken_line_is_named_by_record_line_and_column(tmp_path):
    with pytest.raises(ValueError, match=r"record 2 \(line 2\): not JSON in UTF-8 \(.*: column 21 "):
        load(tmp_path, json.dumps(ONE) + '\n{"instruction": "a" "output": "b"}\n')


def test_a_name_that_is_no_file_is_file_not_found_and_a_folder_is_a_value_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="cookbook: .*tiny"):
        load_examples("cookbook")
    with pytest.raises(ValueError, match="folder"):
        load_examples(tmp_path)


def test_the_split_is_the_books_in_file_order():
    train, val, test = split_examples(list(range(1100)))
    assert (train, test, val) == (list(range(935)), list(range(935, 1045)), list(range(1045, 1100)))
    assert split_examples([0, 1, 2], train=1, test=0) == ([0, 1, 2], [], [])
    for shares in ((0.9, 0.2), (-0.1, 0.5), (float("nan"), 0.1)):
        with pytest.raises(ValueError, match="shares"):
            split_examples([1], *shares)


@needs_shared
def test_the_books_file_and_gsm8k_load():
    assert [len(part) for part in split_examples(load_examples(SHARED / "instruction-data.json"))] == [935, 55, 110]
    problems = load_examples(SHARED / "gsm8k" / "test.jsonl")
    assert len(problems) == 1319 and all("####" in problem["output"] for problem in problems)


def test_the_embedded_data_load_by_name_from_any_folder(tmp_path, monkeypatch):
    if not (ROOT / "tiny" / "instructions.json").exists():
        pytest.skip("the embedded data set is not made yet")
    monkeypatch.chdir(tmp_path)
    assert {"instruction", "input", "output", "task", "level"} <= load_examples("tiny")[0].keys()


# ---------------------------------------------------------------- prompts and supervised ids

WITH_INPUT = {"instruction": "Do {input}.", "input": "{x} %s", "output": "No."}
NO_INPUT = {"instruction": "Do.", "input": "", "output": "No."}
PREAMBLE = ("Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\n")
PROMPTS = {
    "alpaca": (PREAMBLE + "Do {input}.\n\n### Input:\n{x} %s\n\n### Response:\n", PREAMBLE + "Do.\n\n### Response:\n"),
    "phi3": ("<|user|>\nDo {input}.\n{x} %s\n<|assistant|>:\n", "<|user|>\nDo.\n<|assistant|>:\n"),
    "chatml": ("<|im_start|>user\nDo {input}.\n{x} %s<|im_end|>\n<|im_start|>assistant\n",
               "<|im_start|>user\nDo.<|im_end|>\n<|im_start|>assistant\n"),
    "plain": ("Do {input}.\n{x} %s\n", "Do.\n"),
}


@pytest.mark.parametrize("template", PROMPTS)
def test_every_template_is_spelled_out_with_and_without_an_input(template):
    assert set(PROMPTS) == set(data.TEMPLATES)
    assert (format_prompt(WITH_INPUT, template), format_prompt(NO_INPUT, template)) == PROMPTS[template]
    assert format_prompt({"instruction": "Do."}, template) == PROMPTS[template][1]


@pytest.mark.parametrize("template", PROMPTS)
@pytest.mark.parametrize("example", [WITH_INPUT, NO_INPUT], ids=["input", "no input"])
def test_the_supervised_ids_are_exactly_the_response_and_its_end_token(tokenizer, template, example):
    encoded = encode_example(example, tokenizer, template)
    inputs, targets = collate([encoded])
    assert [t for t in targets[0].tolist() if t != IGNORE_INDEX] == [78, 111, 46, 256]  # N o . end
    prompt = PROMPTS[template][example is NO_INPUT].encode()
    assert encoded.ids[: encoded.n_prompt] == list(prompt)
    assert inputs[0].tolist() == [*prompt, 78, 111, 46]
    assert targets[0, len(prompt) - 1] == 78 and targets[0, len(prompt) - 2] == IGNORE_INDEX


@needs_shared
@pytest.mark.parametrize("template", PROMPTS)
def test_the_training_prompt_is_the_generation_prompt_also_before_odd_responses(gpt2, template):
    for response in ("Yes.", "\n\nHello", "\n", " leading", "!?", EOT):
        encoded = encode_example(WITH_INPUT | {"output": response}, gpt2, template)
        assert encoded.ids[: encoded.n_prompt] == gpt2.encode_ordinary(format_prompt(WITH_INPUT, template))
        assert encoded.ids[encoded.n_prompt :] == [*gpt2.encode_ordinary(response), 50256]


@needs_shared
def test_the_supervised_ids_with_gpt2s_tokenizer_are_these(gpt2):
    _, targets = collate([encode_example({"instruction": "Name a colour.", "output": "Blue is a colour."}, gpt2)])
    assert targets[0][targets[0] != IGNORE_INDEX].tolist() == [14573, 318, 257, 9568, 13, 50256]


def test_an_unknown_template_is_a_value_error_that_lists_those_there_are():
    with pytest.raises(ValueError, match="'llama'.*alpaca, phi3, chatml, plain"):
        format_prompt(NO_INPUT, "llama")


def test_the_end_token_spelled_in_data_is_text(tokenizer):
    example = {"instruction": f"Say {EOT}", "input": EOT, "output": f"{EOT} no"}
    (encoded,), report = encode_examples([example], tokenizer)
    assert encoded.ids.count(256) == 1 and encoded.ids[-1] == 256
    assert bytes(encoded.ids[encoded.n_prompt : -1]) == f"{EOT} no".encode()
    assert report["special_text"] == [0]
    assert encode_examples([NO_INPUT], tokenizer, "chatml")[1]["special_text"] == []


def test_a_cut_example_has_no_end_token_and_one_cut_to_nothing_is_a_value_error(tokenizer):
    whole = encode_example(NO_INPUT, tokenizer, "plain")  # 4 + 3 + 1 ids
    assert len(whole.ids) == 8 and encode_example(NO_INPUT, tokenizer, "plain", 8) == whole
    assert encode_example(NO_INPUT, tokenizer, "plain", 7) == Encoded(whole.ids[:7], 4)
    assert encode_example(NO_INPUT, tokenizer, "plain", 5) == Encoded(whole.ids[:5], 4)
    with pytest.raises(ValueError, match="max_length 4; the shortest prompt has 4"):
        encode_example(NO_INPUT, tokenizer, "plain", 4)
    for bad in (1, 0, -3):
        with pytest.raises(ValueError, match=f"max_length {bad}"):
            encode_example(NO_INPUT, tokenizer, "plain", bad)


def test_an_encoded_example_is_frozen(tokenizer):
    with pytest.raises(dataclasses.FrozenInstanceError):
        encode_example(NO_INPUT, tokenizer).n_prompt = 0


def test_dropped_and_truncated_records_are_reported_by_index_and_the_kept_ones_too(tokenizer):
    examples = [NO_INPUT | {"instruction": "x" * n} for n in (1, 9, 6, 20, 2)]  # n + 1 prompt ids, 4 more
    encoded, report = encode_examples(examples, tokenizer, "plain", max_length=9)
    assert report == {"kept": [0, 2, 4], "dropped": [1, 3], "truncated": [2], "special_text": []}
    assert encoded == [encode_example(examples[i], tokenizer, "plain", 9) for i in report["kept"]]
    assert all(len(e.ids) > e.n_prompt for e in encoded)
    with pytest.raises(ValueError, match="none of 2 examples .* max_length 5; the shortest prompt has 10"):
        encode_examples([examples[1], examples[3]], tokenizer, "plain", max_length=5)
    with pytest.raises(ValueError, match="none of 0 examples"):
        encode_examples([], tokenizer)


# ---------------------------------------------------------------- batches


def test_collate_gives_these_inputs_targets_and_weights():
    batch = [Encoded([1, 2, 3, 4, 9], 2), Encoded([5, 6, 9], 1)]
    x = IGNORE_INDEX
    inputs, targets = collate(batch)
    assert inputs.tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]] and targets.tolist() == [[x, 3, 4, 9], [6, 9, x, x]]
    assert inputs.dtype == targets.dtype == torch.int64
    everything = [[2, 3, 4, 9], [6, 9, x, x]]
    assert collate(batch, "all")[1].tolist() == collate(batch, 0.25)[1].tolist() == everything
    assert collate(batch, 0.0)[1].tolist() == targets.tolist()
    assert collate(batch, ignore_index=-1)[1].tolist() == [[-1, 3, 4, 9], [6, 9, -1, -1]]
    weights = token_weights(batch, 0.25)
    assert weights.dtype == torch.float32 and weights.tolist() == [[0.25, 1, 1, 1], [1, 1, 0, 0]]
    assert token_weights(batch, "response").tolist() == [[0, 1, 1, 1], [1, 1, 0, 0]]
    assert token_weights(batch, "all").tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    with pytest.raises(ValueError, match="empty batch"):
        collate([])


@pytest.mark.parametrize("loss_on", ["prompt", "", "1.5", -0.1, 2, None, float("nan"), [1]])
def test_what_the_loss_is_on_is_two_words_or_a_number_from_0_to_1(loss_on):
    for call in (data.prompt_weight, lambda w: collate([Encoded([1, 2], 1)], w)):
        with pytest.raises(ValueError, match="response, all, or a weight"):
            call(loss_on)
    assert [data.prompt_weight(w) for w in ("response", "all", "0.3", 0, 1, 0.5)] == [0, 1, 0.3, 0, 1, 0.5]


def books_collate(rows, pad=256, ignore=-100):
    """custom_collate_fn of chapter 7, on rows without end token."""
    width = max(len(row) + 1 for row in rows)
    inputs, targets = [], []
    for row in rows:
        padded = row + [pad] * (width - len(row))
        target = torch.tensor(padded[1:] + [pad])[: width - 1]
        where = (target == pad).nonzero().squeeze(1)
        target[where[1:]] = ignore
        inputs.append(padded[:-1])
        targets.append(target.tolist())
    return inputs, targets


def test_batches_with_the_loss_on_all_are_the_books(tokenizer):
    examples = [NO_INPUT | {"output": "o" * n} for n in (3, 1, 12)]
    encoded = [encode_example(example, tokenizer, "plain") for example in examples]
    inputs, targets = collate(encoded, loss_on="all")
    assert (inputs.tolist(), targets.tolist()) == books_collate([e.ids[:-1] for e in encoded])


def padding_share(lengths, groups):
    return 1 - sum(lengths) / sum(len(g) * max(lengths[i] for i in g) for g in groups)


def test_batches_hold_every_index_once_and_depend_on_seed_and_epoch_alone():
    lengths = [i * 37 % 50 + 2 for i in range(83)]
    first = batches(lengths, 8, 123, 0)
    data.random.seed(1)
    state = data.random.getstate(), torch.get_rng_state()
    assert batches(lengths, 8, 123, 0) == first
    assert data.random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert sorted(sum(first, [])) == list(range(83))
    assert sorted(map(len, first)) == [3] + [8] * 10
    for other in (batches(lengths, 8, 123, 1), batches(lengths, 8, 124, 0)):
        assert other != first and len(other) == len(first)
        assert {frozenset(b) for b in other} != {frozenset(b) for b in first}  # the members too
    assert batches([5, 3, 4], 8, 0, 0) != [] and batches([], 8, 0, 0) == []
    with pytest.raises(ValueError, match="batch_size 0"):
        batches(lengths, 0, 1, 1)


def test_the_order_of_an_epoch_is_this_one_on_every_machine():
    assert batches([4, 9, 4, 7, 5], 2, seed=123, epoch=0) == [[0, 4], [3, 1], [2]]


def test_batches_come_neither_shortest_nor_longest_first():
    lengths = list(range(2, 402))
    means = [sum(lengths[i] for i in b) / len(b) for b in batches(lengths, 8, 123, 0)]
    rises = sum(a < b for a, b in zip(means, means[1:]))
    assert 10 < rises < 40


@needs_shared
def test_padding_of_the_books_records_is_below_two_percent(gpt2):
    encoded, _ = encode_examples(load_examples(SHARED / "instruction-data.json")[:935], gpt2)
    lengths = [len(e.ids) for e in encoded]
    in_file_order = [list(range(i, min(i + 8, 935))) for i in range(0, 935, 8)]
    assert padding_share(lengths, in_file_order) > 0.1
    assert all(padding_share(lengths, batches(lengths, 8, 123, epoch)) < 0.02 for epoch in range(5))


# ---------------------------------------------------------------- tokenizer


def test_a_folder_with_vocab_and_merges_makes_the_merges_it_names(tmp_path):
    vocab = write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_ordinary("hello hello") == [vocab["hello"], vocab["Ġhell"], ord("o")]
    assert tokenizer.eot_token == vocab[EOT] == tokenizer.n_vocab - 1
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def tokenizer_json(vocab, merges, **changes):
    return {"normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            "added_tokens": [{"id": vocab[EOT], "content": EOT, "special": True}],
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}} | changes


def test_tokenizer_json_and_tiktoken_files_give_the_same_encoding_and_json_goes_first(tmp_path):
    vocab = write_tokenizer(tmp_path / "a")
    expected = load_tokenizer(tmp_path / "a")
    (tmp_path / "b").mkdir()
    ranks = sorted(expected._mergeable_ranks.items(), key=lambda item: item[1])
    lines = [data.base64.b64encode(token).decode() + f" {rank}" for token, rank in ranks]
    (tmp_path / "b" / "gpt2.tiktoken").write_text("\n".join(lines) + "\n")
    others = [load_tokenizer(tmp_path / "b")]
    write_tokenizer(tmp_path / "b", merges=[])
    assert load_tokenizer(tmp_path / "b").n_vocab == 257
    for merges in ([list(m) for m in MERGES], [" ".join(m) for m in MERGES]):
        (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocab, merges)))
        others.append(load_tokenizer(tmp_path / "b"))
    for other in others:
        assert (other._mergeable_ranks, other._special_tokens) == (expected._mergeable_ranks, expected._special_tokens)


def good():
    return {char: byte for byte, char in data.BYTE_TO_CHAR.items()} | {"he": 256, "Ġhe": 257, EOT: 258}


def swap(vocab, a, b):
    return vocab | {a: vocab[b], b: vocab[a]}


GOOD_MERGES = [("h", "e"), ("Ġ", "he")]
BROKEN_VOCAB_AND_MERGES = {
    "a single byte is missing": (lambda v: {k: i for k, i in v.items() if k != "q"}, GOOD_MERGES, "single bytes missing, first 0x71"),
    "two tokens have one id": (lambda v: v | {"he": 104}, GOOD_MERGES, "wrong at 104"),
    "an id is beyond the end": (lambda v: v | {EOT: 9999}, GOOD_MERGES, "wrong at 9999"),
    "an id is negative": (lambda v: v | {"q": -1}, GOOD_MERGES, "wrong at -1"),
    "an id is text": (lambda v: v | {"q": "113"}, GOOD_MERGES, "not the format"),
    "an id is a float": (lambda v: v | {"q": 113.0}, GOOD_MERGES, "wrong at 113.0"),
    "an id is true": (lambda v: v | {v_1: True for v_1, i in v.items() if i == 1}, GOOD_MERGES, "wrong at True"),
    "no end token": (lambda v: {k: i for k, i in v.items() if k != EOT}, GOOD_MERGES, "no <|endoftext|>"),
    "an unknown character": (lambda v: v | {"東": 259}, GOOD_MERGES, "東"),
    "an empty token": (lambda v: v | {"": 259}, GOOD_MERGES, "empty"),
    "ids against merge order": (lambda v: swap(v, "he", "Ġhe"), GOOD_MERGES, "cannot be merged"),
    "merges in another order": (lambda v: v, GOOD_MERGES[::-1], "merge 1 is"),
    "a merge is missing": (lambda v: v, GOOD_MERGES[:1], "merge 2 is None"),
    "a merge too many": (lambda v: v, [*GOOD_MERGES, ("a", "b")], "merge 3 is ['a', 'b']"),
    "a merge of another split": (lambda v: v, [("h", "e"), ("Ġh", "e")], "merge 2 is"),
    "a merge of three": (lambda v: v, [("h", "e"), ("Ġ", "h", "e")], "merge 2 is"),
    "a token without merge": (lambda v: v | {"xyz": 258, EOT: 259}, GOOD_MERGES, "cannot be merged"),
    "a list for a vocabulary": (lambda v: list(v), GOOD_MERGES, "not the format"),
}


@pytest.mark.parametrize("case", BROKEN_VOCAB_AND_MERGES)
def test_a_broken_vocabulary_is_a_value_error_before_tiktoken_can_panic(tmp_path, monkeypatch, case):
    change, merges, needle = BROKEN_VOCAB_AND_MERGES[case]
    write_tokenizer(tmp_path, good(), GOOD_MERGES)
    load_tokenizer(tmp_path)
    write_tokenizer(tmp_path, change(good()), merges)
    monkeypatch.setattr(tiktoken, "Encoding", lambda *a, **k: pytest.fail("tiktoken saw it"))
    with pytest.raises(ValueError, match=tmp_path.name) as caught:
        load_tokenizer(tmp_path)
    assert needle in str(caught.value)


SPEC = tokenizer_json(good(), [list(m) for m in GOOD_MERGES])
BYTE_LEVEL = SPEC["pre_tokenizer"]


@pytest.mark.parametrize("name, content, needle", [
    ("tokenizer.json", "{", "not JSON"),
    ("tokenizer.json", "[]", "not the format"),
    ("tokenizer.json", "{}", "'model'"),
    ("tokenizer.json", json.dumps(SPEC | {"model": SPEC["model"] | {"type": "WordPiece"}}), "GPT-2's kind"),
    ("tokenizer.json", json.dumps(SPEC | {"normalizer": {"type": "NFC"}}), "GPT-2's kind"),
    ("tokenizer.json", json.dumps(SPEC | {"pre_tokenizer": None}), "GPT-2's kind"),
    ("tokenizer.json", json.dumps(SPEC | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}}), "GPT-2's kind"),
    ("tokenizer.json", json.dumps(SPEC | {"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}}), "GPT-2's kind"),
    ("tokenizer.json", json.dumps(SPEC | {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}), "GPT-2's kind"),
    ("tokenizer.json", json.dumps(SPEC | {"model": SPEC["model"] | {"dropout": 0.5}}), "GPT-2's kind"),
    ("tokenizer.json", json.dumps(SPEC | {"model": SPEC["model"] | {"end_of_word_suffix": "</w>"}}), "GPT-2's kind"),
    ("tokenizer_config.json", '{"add_prefix_space": true}', "says add_prefix_space"),
    ("tokenizer.json", json.dumps(SPEC | {"added_tokens": []}), "endoftext"),
    ("vocab.json", "<html>", "vocab.json: not JSON"),
    ("merges.txt", "h e\n", "merge 2 is None"),
    ("merges.txt", b"\xff\xfe\n", "utf-8"),
])
def test_a_broken_tokenizer_file_is_a_value_error_that_names_the_folder(tmp_path, name, content, needle):
    write_tokenizer(tmp_path, good(), GOOD_MERGES)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=tmp_path.name) as caught:
        load_tokenizer(tmp_path)
    assert needle in str(caught.value)


@pytest.mark.parametrize("content", ["", "aGVsbG8=\n", "!!!! 0\n", "aGVsbG8= x\n"])
def test_a_broken_tiktoken_file_is_a_value_error(tmp_path, content):
    (tmp_path / "gpt2.tiktoken").write_text(content)
    with pytest.raises(ValueError, match="broken tokenizer"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_and_no_folder_at_all_are_file_not_found(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="vocab.json with merges.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="llama: no such model folder.*tiny, gpt2"):
        load_tokenizer("llama")


def test_gpt2_by_name_without_network_is_one_line_with_the_remedy(monkeypatch):
    def offline(name):
        raise requests.exceptions.ConnectionError("a\nlong\nstory")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(FileNotFoundError, match="gpt2-medium: .*ConnectionError.*TIKTOKEN_CACHE_DIR") as caught:
        load_tokenizer("gpt2-medium")
    assert "\n" not in str(caught.value)


@needs_shared
def test_the_names_of_gpt2_mean_the_tokenizer_of_the_files(tmp_path, monkeypatch, gpt2):
    for source, cached in (("merges.txt", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
                           ("vocab.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")):
        shutil.copy(SHARED / "gpt2" / source, tmp_path / cached)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    named = load_tokenizer("distilgpt2")
    assert named._mergeable_ranks == gpt2._mergeable_ranks and named._special_tokens == gpt2._special_tokens
    assert named._pat_str == gpt2._pat_str == data.GPT2_PATTERN
    save_tokenizer(named, tmp_path / "saved")


@needs_shared
def test_gpt2s_tokenizer_round_trips_and_saved_files_hold_the_same_vocabulary_and_merges(tmp_path, gpt2):
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    assert gpt2.encode_ordinary("Hello, world!") == [15496, 11, 995, 0]
    for text in (*TEXTS, (SHARED / "the-verdict.txt").read_text()):
        assert gpt2.decode(gpt2.encode_ordinary(text)) == text
    save_tokenizer(gpt2, tmp_path)
    theirs = SHARED / "gpt2"
    assert json.loads((tmp_path / "vocab.json").read_text()) == json.loads((theirs / "vocab.json").read_text())
    assert (tmp_path / "merges.txt").read_text() == (theirs / "merges.txt").read_text()


def test_a_saved_tokenizer_loads_as_the_same_one_with_its_further_special_tokens(tmp_path):
    write_tokenizer(tmp_path / "a")
    (tmp_path / "a" / "added_tokens.json").write_text(json.dumps({"<|pad|>": 263}))
    tokenizer = load_tokenizer(tmp_path / "a")
    save_tokenizer(tokenizer, tmp_path / "b" / "new")
    again = load_tokenizer(tmp_path / "b" / "new")
    assert again._mergeable_ranks == tokenizer._mergeable_ranks
    assert again._special_tokens == tokenizer._special_tokens == {EOT: 262, "<|pad|>": 263}
    assert again.encode_ordinary("<|pad|>") == list(b"<|pad|>")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "tokenizer.json").write_text("another's")
    (tmp_path / "used" / "added_tokens.json").write_text('{"<|more|>": 262}')
    write_tokenizer(tmp_path / "plain")
    save_tokenizer(load_tokenizer(tmp_path / "plain"), tmp_path / "used")
    assert load_tokenizer(tmp_path / "used")._special_tokens == {EOT: 262}
    other = tiktoken.Encoding("other", pat_str=r"\S+|\s+", mergeable_ranks=tokenizer._mergeable_ranks,
                              special_tokens=tokenizer._special_tokens)
    with pytest.raises(ValueError, match="other: only .* GPT-2's pattern"):
        save_tokenizer(other, tmp_path / "c")


@needs_shared
def test_ids_equal_those_of_transformers_gpt2_tokenizer_also_from_saved_files(tmp_path, gpt2):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(gpt2, tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.eos_token_id == 50256 and len(theirs) == 50257
    examples = load_examples(SHARED / "instruction-data.json")[:200]
    for text in [*(t for t in TEXTS if EOT not in t), *(format_prompt(e) + e["output"] for e in examples)]:
        assert gpt2.encode_ordinary(text) == theirs(text)["input_ids"]
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "tokenizer.json").exists()
    assert load_tokenizer(tmp_path / "theirs")._mergeable_ranks == gpt2._mergeable_ranks


# ---------------------------------------------------------------- script


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to run in: five records and a model of bytes."""
    write_tokenizer(tmp_path / "model", merges=[])
    records = [NO_INPUT | {"instruction": "x" * n} for n in (1, 9, 6, 20, 2)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "bad.json").write_text('[{"instruction": "a"}]')
    monkeypatch.chdir(tmp_path)


HERE = ["--data", "records.json", "--model", "model"]


def test_the_script_prints_counts_lengths_padding_and_one_example(folder, capsys):
    data.main([*HERE, "--template", "plain", "--max-length", "9"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for expected in ("5 records, 3 used; template plain", "truncated 1 (first: record 3)", "dropped 2 (first: record 2)",
                     "special text 0", "prompt 2 3 3 7", "response 2 4 4 4", "both 6 7 7 9",
                     "padding in batches of 8, at random: 18.5%", ">>>No.<|endoftext|><<<"):
        assert expected in lines
    data.main([*HERE, "--template", "plain", "--loss-on", "0.5"])
    assert capsys.readouterr().out.endswith(">>>x\nNo.<|endoftext|><<<\n")


@pytest.mark.parametrize("flags, code, needle", [
    (["--data", "absent.json"], 1, "no such data"),
    (["--data", "bad.json"], 1, "record 1: fields"),
    (["--model", "absent"], 1, "no such model"),
    (["--max-length", "2"], 1, "max_length 2"),
    (["--max-length", "1"], 2, "--max-length 1"),
    (["--loss-on", "some"], 2, "--loss-on: loss_on 'some'"),
    (["--template", "llama"], 2, "--template"),
    (["--nonsense"], 2, "--nonsense"),
])
def test_what_the_script_is_given_wrong_ends_in_one_line_and_1_for_data_2_for_flags(folder, capsys, flags, code, needle):
    with pytest.raises(SystemExit) as ended:
        data.main([*HERE, *flags])
    out, err = capsys.readouterr()
    line = err if code == 2 else ended.value.code + "\n"  # Python prints a text given to sys.exit, and exits with 1
    assert ended.value.code == 2 if code == 2 else err == ""
    assert out == "" and line.startswith("error: ") and line.count("\n") == 1 and needle in line


def test_an_error_of_the_real_process_is_one_line_and_exit_code_1(folder):
    done = subprocess.run([sys.executable, str(ROOT / "data.py"), *HERE, "--data", "bad.json"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and done.stderr.startswith("error: bad.json")


def test_the_script_ends_quietly_when_its_reader_has_seen_enough(folder):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as closed:
        command = [sys.executable, str(ROOT / "data.py"), *HERE]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


RECORD = {"instruction": "Add 2 and 3.", "input": "", "output": "5", "instruction_long": "Take 2, add 3.",
          "rationale": "2 + 3 is 5.", "draft": "6", "level": 1}


def test_an_instruction_is_the_records_own_or_its_long_paraphrase():
    assert data.reshape_example(RECORD) == RECORD
    assert data.reshape_example(RECORD, "long") == {**RECORD, "instruction": "Take 2, add 3."}


def test_a_response_is_the_answer_a_worked_solution_or_a_corrected_draft():
    outputs = [data.reshape_example(RECORD, response=kind)["output"] for kind in (None, *data.RESPONSES)]
    assert outputs == ["5", "5", "2 + 3 is 5.\nAnswer: 5", "6\nThat is wrong. 2 + 3 is 5.\nAnswer: 5"]


def test_a_gsm8k_solution_is_taken_apart():
    record = {"instruction": "How many?", "input": "", "output": "4 and 5 make 9.\n#### 9"}
    outputs = [data.reshape_example(record, response=kind)["output"] for kind in (None, "answer", "rationale")]
    assert outputs == ["4 and 5 make 9.\n#### 9", "9", "4 and 5 make 9.\nAnswer: 9"]
    recipe = record | {"output": "Beat them.\n#### Ingredients\n- egg\n- milk"}  # a heading, not the mark
    assert data.reshape_example(recipe, response="answer") == recipe


@pytest.mark.parametrize("kind", [{"instruction": "long"}, {"response": "rationale"}, {"response": "reflection"}])
def test_a_record_without_the_needed_text_is_refused_by_field(kind):
    with pytest.raises(ValueError, match="instruction_long|rationale|draft"):
        data.reshape_example({"instruction": "a", "input": "", "output": "b", "draft": " "}, **kind)


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match="unknown"):
        data.reshape_example(RECORD, "adaptive")
    with pytest.raises(ValueError, match="unknown"):
        data.reshape_example(RECORD, response="poem")


def test_a_system_text_beside_the_conversation_opens_it_as_a_system_message_does(tmp_path):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    for name, record in (("a", {"system": "Be brief.", "conversations": turns}), ("b", {"system": "", "conversations": turns}),
                         ("c", {"conversations": [{"from": "system", "value": "Be brief."}, *turns]})):
        (tmp_path / name).write_text(json.dumps([record]))
    a, b, c = (data.load_examples(tmp_path / name)[0] for name in "abc")
    assert a == c and a["instruction"] == "Be brief.\n\nhi" and b["instruction"] == "hi"
    (tmp_path / "d").write_text(json.dumps([{"system": 5, "conversations": turns}]))
    with pytest.raises(ValueError, match="record 1"):
        data.load_examples(tmp_path / "d")


def test_the_script_cuts_where_the_model_would_and_names_the_fields_that_nothing_uses(tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps([RECORD | {"output": "word " * 400, "context": "c", "level": 1}, RECORD]))
    data.main(["--data", str(path)])
    out = capsys.readouterr().out
    longest = json.loads((ROOT / "tiny" / "model" / "config.json").read_text())["n_positions"]
    assert f"2 records, 2 used; template alpaca\ncut after    {longest} ids\nfields that nothing here uses: context\n" in out
    assert "truncated    1 (first: record 1)" in out
    with pytest.raises(SystemExit) as error:
        data.main(["--data", str(path), "--max-length", str(longest + 1)])
    err = capsys.readouterr().err
    assert error.value.code == 2 and f"--max-length {longest + 1}: the model takes at most {longest} ids" in err and err.count("\n") == 1
    assert data.block_size("gpt2-xl") == 1024 and data.block_size(tmp_path) is None
    (tmp_path / "config.json").write_text("[1]")
    assert data.block_size(tmp_path) is None


def test_the_script_shows_that_batches_at_random_hold_more_padding(capsys):
    data.main(["--data", "tiny", "--model", "tiny"])
    at_random, grouped = (float(line.split()[-1].rstrip("%")) for line in capsys.readouterr().out.splitlines() if line.startswith("padding"))
    assert at_random > 3 * grouped


def test_an_error_about_a_name_with_a_line_break_is_one_line(folder):
    with pytest.raises(SystemExit, match="error: ab sent.json: no such data") as ended:
        data.main(["--data", "ab\nsent.json"])
    assert "\n" not in ended.value.code


def test_every_control_token_of_the_tokenizer_is_reported_where_it_is_spelled(tmp_path):
    write_tokenizer(tmp_path / "a", merges=[])
    (tmp_path / "a" / "added_tokens.json").write_text(json.dumps({"<|pad|>": 257}))
    examples = [NO_INPUT, NO_INPUT | {"instruction": "Say <|pad|>."}, NO_INPUT | {"output": "<|pad|>"}, WITH_INPUT | {"input": "<|pad|>"}]
    encoded, report = encode_examples(examples, load_tokenizer(tmp_path / "a"))
    assert report["special_text"] == [1, 2, 3] and all(257 not in e.ids for e in encoded)
