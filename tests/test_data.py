"""data.py: records, prompts, ids, batches, the tokenizer's files."""

import functools
import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiktoken
import torch

import data
import gpt
from data import Encoded, batches, collate, encode_example, encode_examples, format_prompt
from data import load_examples, load_parts, load_tokenizer, split_examples, to_example

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
EOT = "<|endoftext|>"
X = -100
MERGES = [("l", "l"), ("h", "e"), ("Ġ", "he"), ("he", "ll"), ("hell", "o"), ("Ġhe", "ll")]
TEXTS = ["", " ", "hello hello", "a\r\nb\n\n\n", "it's 1234567", "naïve 東京 👩‍👩‍👧 \u2028\x00",
         "x" * 3000, "<|im_start|>user", "\t\t  def f():\n    return  1 ", "'LL 'll"]

def byte_vocab(merges=()):
    """Ids are byte values, then what the merges make, then the end token."""
    vocab = data.CHAR_TO_BYTE | {a + b: 256 + n for n, (a, b) in enumerate(merges)}
    return vocab | {EOT: len(vocab)}

def write_tokenizer(folder, vocab, merges):
    write(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    return write(folder / "merges.txt", "\n".join(lines)).parent

@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):  # of bytes alone: ids are the UTF-8 bytes, and 256 ends a text
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("bytes"), byte_vocab(), []))

@pytest.fixture(scope="session")
def gpt2():
    return load_tokenizer(SHARED / "gpt2")

def write(path, content):
    content = content if isinstance(content, (bytes, str)) else json.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path

USER, REPLY = {"role": "user", "content": "Add."}, {"role": "assistant", "content": "2"}
HUMAN, GPT = {"from": "human", "value": "Add."}, {"from": "gpt", "value": "2"}
ADD = {"instruction": "Add.", "input": "", "output": "2"}
BRIEF = ADD | {"instruction": "Be brief.\n\nAdd."}
PAIR = {"instruction": "Add.", "output": "2"}
ACCEPTED = [
    (PAIR | {"input": "1 1"}, ADD | {"input": "1 1"}), ({"prompt": "Add.", "completion": "2"}, ADD),
    ({"messages": [USER, REPLY], "source": "x"}, ADD | {"source": "x"}),
    ({"messages": [{"role": "system", "content": "Be brief."}, USER, REPLY]}, BRIEF),
    ({"conversations": [HUMAN, GPT]}, ADD), (PAIR | {"system": "Be brief."}, BRIEF),
    ({"system_prompt": "Be brief.", "question": "Add.", "response": "2"}, BRIEF),
    (PAIR | {"system": "", "history": [], "choices": None}, ADD | {"history": [], "choices": None}),
    ({"question": "Add.", "context": "1 1", "answer": "2"}, ADD | {"input": "1 1"}),
    (PAIR | {"label": 0}, ADD | {"label": 0}),  # a class
    ({"messages": [USER | {"weight": 0, "name": "ann"}, REPLY | {"weight": 1}]},
     ADD | {"user weight": 0, "user name": "ann", "assistant weight": 1}),
    ({"prompt": None, "completion": None, "question": "Add.", "answer": "2"}, ADD)]

@pytest.mark.parametrize("record, expected", ACCEPTED)
def test_an_accepted_record_becomes_instruction_input_output_and_its_other_fields(record, expected):
    example = to_example(record)
    assert example == expected and list(example)[:3] == ["instruction", "input", "output"]

REFUSED = [
    ("text", "named fields"), ({"instruction": "a"}, "0 texts, not 1, as ['output'"),
    ({"output": "a"}, "message'] in ['output']"), (PAIR | {"input": 0}, "['input'] is no text"),
    *[(PAIR | {"output": empty}, "0 texts, not 1, as ['output'] in ['instruction', 'output']")
      for empty in (None, " \n", float("nan"))],
    ({"messages": [USER, REPLY | {"content": [{"type": "text"}]}]}, "['assistant message'] is no"),
    (PAIR | {"messages": [USER, REPLY]}, "2 texts, not 1, as ['instruction', 'user message']"),
    ({"messages": [USER, REPLY], "conversations": [HUMAN, GPT]}, "conversations is not read"),
    *[(PAIR | {name: ["a"]}, f"{name} is not read")
      for name in ("history", "choices", "options", "tools", "images")],
    ({"messages": [USER, REPLY | {"tool_calls": [{"id": 1}]}]}, "tool_calls is not read"),
    *[(PAIR | {name: False}, f"not to be learned ({name})")
      for name in ("label", "train", "training", "trainable", "weight", "loss_mask")],
    ({"messages": [USER, REPLY | {"weight": 0}]}, "not to be learned (assistant weight)"),
    (PAIR | {"output": "half \ud83d"}, "surrogates"), ({"messages": "hello"}, "list of objects"),
    ({"messages": [USER, REPLY] * 2}, "messages of user, assistant, user, assistant; split"),
    ({"prompt": [USER], "completion": [REPLY]}, "['prompt'] is no text; chats go in messages")]

@pytest.mark.parametrize("record, needle", REFUSED)
def test_a_record_that_cannot_be_used_is_refused_by_file_record_and_line(tmp_path, record, needle):
    path = write(tmp_path / "r.jsonl", f"\n{json.dumps(PAIR)}\n\n{json.dumps(record)}\n")
    with pytest.raises(ValueError) as caught:
        load_examples(path)
    assert f"{path}: 1 of 2 records are bad: record 2 (line 4): " in str(caught.value)
    assert needle in str(caught.value)

def test_all_bad_records_are_counted_and_the_first_three_named(tmp_path):
    rows = [PAIR | {"output": output} for output in (None, "", float("nan"), " ", "fine", None)]
    with pytest.raises(ValueError, match="5 of 6 .*record 1 .*record 2 .*record 3 (?!.*record 4)"):
        load_examples(write(tmp_path / "r.json", rows))

def test_lines_may_have_a_byte_order_mark_windows_ends_blanks_and_odd_separators(tmp_path):
    rows = [ADD, ADD | {"output": "a\u2028b"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for joined in ("\ufeff" + "\r\n".join(lines) + "\r\n", "\n\n" + lines[0] + "\n \n\n" + lines[1],
                   "\n".join(lines), json.dumps(rows), "\ufeff \r\n" + json.dumps(rows, indent=1),
                   "[" + lines[0] + "\n," + lines[1] + "]"):
        assert load_examples(write(tmp_path / "r.txt", joined)) == rows
    assert load_examples(write(tmp_path / "r.txt", json.dumps(ADD, indent=2))) == [ADD]

@pytest.mark.parametrize("content, needle", [
    (b"", "empty"), (b"[]", "0 of 0"), (b"\x1f\x8b\x08", "is gzip"), (b"\xfd7zXZ\0", "is xz"),
    (b"PK\x03\x04", "is zip or xlsx"), (b"PAR1\x15", "is parquet"), (b"\n\n  <html>", "a web page"),
    ("[]".encode("utf-16"), "is UTF-16"), (b"\xff\xff\x78", "binary"), (b"[" * 100_000, "not JSON"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    (b"instruction,output\na,b\n", "csv, text or binary; needed is UTF-8 JSON"),
    (b'[{"instruction": "a", "output": "b"}, {"instr', "line 1: not JSON"),
    (b'[{"instruction": "a\xe9", "output": "b"}]', "not JSON ('utf-8' codec"),
    (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a" "completion"', "line 2: not JSON")])
def test_a_file_that_is_no_data_is_named_as_what_it_is(tmp_path, content, needle):
    path = write(tmp_path / "records.json", content)
    with pytest.raises(ValueError, match="records.json") as caught:
        load_parts(path)
    assert needle in str(caught.value) and len(str(caught.value)) < 300

def records(n):
    return [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(n)]

def test_the_split_is_the_books_in_file_order_or_a_shuffle_by_its_seed():
    numbers = list(range(1100))
    assert split_examples(numbers) == (numbers[:935], numbers[1045:], numbers[935:1045])
    assert split_examples(numbers[:7], train=0.5, test=0.4) == ([0, 1, 2], [5, 6], [3, 4])
    shuffled = split_examples(numbers, shuffle=1)
    assert [len(part) for part in shuffled] == [935, 55, 110]
    assert sorted(sum(shuffled, [])) == numbers == list(range(1100))  # the argument stays as it is
    again, other = (split_examples(numbers, shuffle=seed) for seed in (1, 0))
    assert again == shuffled and other[0] not in (shuffled[0], numbers[:935])

def test_a_users_file_is_shuffled_so_that_each_kind_is_in_each_part(tmp_path):
    sorted_by_kind = [record | {"task": i // 100} for i, record in enumerate(records(400))]
    path = write(tmp_path / "r.json", sorted_by_kind)
    parts = load_parts(path)
    assert (parts.split, parts.rows, parts.notes) == ("shuffled", 400, [])
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [340, 20, 40]
    assert all({r["task"] for r in part} == {0, 1, 2, 3} for part in (parts.train, parts.test))
    assert [sorted_by_kind[i] for i in parts.positions] == parts.train
    assert parts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_parts(shutil.copy(path, tmp_path / "other name.json")) == parts
    assert load_examples(path) == sorted_by_kind
    assert load_parts(path, split="file order").train == sorted_by_kind[:340]
    assert load_parts(path, split="folder") == load_parts(path, split="shuffled") == parts
    assert load_examples(write(path, records(1))) == records(1)
    with pytest.raises(ValueError, match="r.json: at least 2 records are needed"):
        load_parts(path)

def test_a_folder_with_three_parts_is_taken_as_it_is(tmp_path):
    everything = records(6)
    files = [tmp_path / file for file in ("train.jsonl", "val.jsonl", "test.json")]
    write(files[0], "\n".join(map(json.dumps, everything[:3])))
    write(files[2], everything[4:])
    with pytest.raises(FileNotFoundError, match="no .*val.json"):
        load_parts(tmp_path)
    write(files[1], everything[3:4])
    parts = load_parts(tmp_path, split="shuffled")
    assert (parts.split, parts.rows, parts.positions) == ("folder", 6, [0, 1, 2])
    assert (parts.train, parts.val, parts.test) == (everything[:3], everything[3:4], everything[4:])
    content = b"\0".join(file.read_bytes() for file in files)  # where a part ends counts
    assert parts.sha256 == hashlib.sha256(content).hexdigest()
    assert load_examples(tmp_path) == everything

def test_the_notes_name_unused_fields_and_count_test_prompts_of_the_training_part(tmp_path):
    rows = [r | {"task": "a", "level": 1, "draft": "x", "source": "web", "none": None}
            for r in records(20)]
    rows[18] = rows[18] | {"instruction": "Say 3.", "output": "other"}
    rows[1], rows[17] = rows[1] | {"input": "other"}, rows[17] | {"instruction": "Say 1."}
    rows[0] = {"messages": [USER | {"name": "ann"}, REPLY]}
    assert load_parts(write(tmp_path / "r.json", rows), split="file order").notes == [
        "fields that nothing uses: source, user name",
        "1 of 2 test prompts also stand in the training part"]

def test_the_embedded_data_keep_their_order_and_load_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = load_parts("tiny")
    stored = json.loads((ROOT / "tiny" / "instructions.json").read_bytes())
    assert (parts.split, parts.notes) == ("file order", []) and parts.train == stored[:3825]
    if SHARED.is_dir():
        book = load_parts(SHARED / "instruction-data.json")
        assert (book.rows, book.sha256) == (1100, data.DATASETS["book"][1])

@pytest.fixture
def server(tmp_path, monkeypatch):  # of the two published sets in small, and an empty cache
    folder = tmp_path / "server"
    rows = [r | {"output": "" if i in (2, 5) else r["output"]} for i, r in enumerate(records(20))]
    alpaca = write(folder / data.DATASETS["alpaca"][0], rows)
    book = write(folder / data.DATASETS["book"][0], records(5))
    sha256 = hashlib.sha256(book.read_bytes()).hexdigest()
    monkeypatch.setitem(data.DATASETS, "book", (data.DATASETS["book"][0], sha256))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(data, "GITHUB", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield book, alpaca
        running.shutdown()

def test_published_sets_are_fetched_once_and_keep_their_order(server, tmp_path):
    assert load_examples("book") == records(5)
    alpaca = load_parts("alpaca")
    assert alpaca.positions == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    assert (alpaca.split, alpaca.rows) == ("file order", 20)
    assert alpaca.notes == ["2 records have no output and are left out"]
    folder = tmp_path / "home" / "gpt2-finetune" / "data"
    for name, published in zip(("book.json", "alpaca.json"), server):
        assert (folder / name).read_bytes() == published.read_bytes()
        published.unlink()
    assert load_examples("book") == records(5) and load_parts("alpaca") == alpaca
    with pytest.raises(ValueError, match="2 of 20 records are bad"):  # a user's file is never cut
        load_parts(folder / "alpaca.json")

def test_what_cannot_be_fetched_leaves_nothing_and_is_named(server, tmp_path, monkeypatch):
    write(server[0], records(4))
    with pytest.raises(FileNotFoundError, match="invalid hash value.*or put it into .*book.json"):
        load_parts("book")
    monkeypatch.setattr(data, "GITHUB", "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match="127.0.0.1:9/.*refused.*put it .*alpaca.json"):
        load_parts("alpaca")
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]

WITH_INPUT = {"instruction": "Do {input}.", "input": "{x} %s", "output": "No."}
NO_INPUT = {"instruction": "Do.", "input": "", "output": "No."}
BELOW = ("Below is an instruction that describes a task. Write a response that appropriately "
         "completes the request.\n\n### Instruction:\n")
PROMPTS = {
    "alpaca": (BELOW + "Do {input}.\n\n### Input:\n{x} %s\n\n### Response:\n",
               BELOW + "Do.\n\n### Response:\n"),
    "phi3": ("<|user|>\nDo {input}.\n{x} %s\n<|assistant|>:\n", "<|user|>\nDo.\n<|assistant|>:\n"),
    "chatml": ("<|im_start|>user\nDo {input}.\n{x} %s<|im_end|>\n<|im_start|>assistant\n",
               "<|im_start|>user\nDo.<|im_end|>\n<|im_start|>assistant\n"),
    "plain": ("Do {input}.\n{x} %s\n", "Do.\n")}

@pytest.mark.parametrize("template", PROMPTS)
def test_the_supervised_ids_are_exactly_the_response_and_its_end_token(tokenizer, template):
    assert set(PROMPTS) == set(data.TEMPLATES)
    for example, prompt in zip((WITH_INPUT, NO_INPUT), PROMPTS[template]):
        assert format_prompt(example, template) == prompt
        encoded = encode_example(example, tokenizer, template)
        assert encoded.ids[: encoded.n_prompt] == list(prompt.encode())
        inputs, targets = collate([encoded])
        assert targets[0].tolist() == [X] * (len(prompt) - 1) + [78, 111, 46, 256]  # N o . end
        assert inputs[0].tolist() == [*prompt.encode(), 78, 111, 46]
    assert format_prompt({"instruction": "Do."}, template) == PROMPTS[template][1]

@needs_shared
@pytest.mark.parametrize("template", PROMPTS)
def test_the_training_prompt_is_the_generation_prompt_also_before_odd_responses(gpt2, template):
    for response in ("Yes.", "\n\nHello", "\n", " leading", "!?", EOT):
        encoded = encode_example(WITH_INPUT | {"output": response}, gpt2, template)
        prompt = gpt2.encode_ordinary(format_prompt(WITH_INPUT, template))
        assert encoded.ids == [*prompt, *gpt2.encode_ordinary(response), 50256]
        assert encoded.n_prompt == len(prompt)
    _, targets = collate([encode_example(WITH_INPUT | {"output": "Blue is a colour."}, gpt2)])
    assert targets[0][targets[0] != X].tolist() == [14573, 318, 257, 9568, 13, 50256]

def test_a_cut_example_has_no_end_token_and_one_cut_to_its_prompt_is_left_out(tokenizer):
    whole = encode_example(NO_INPUT, tokenizer, "plain")
    assert whole == Encoded([*b"Do.\nNo.", 256], 4)
    for n in (8, 7, 5):
        assert encode_example(NO_INPUT, tokenizer, "plain", n) == Encoded(whole.ids[:n], 4)
    with pytest.raises(ValueError, match="max_length 4 leaves no response to 1 prompts"):
        encode_example(NO_INPUT, tokenizer, "plain", 4)
    examples = [NO_INPUT | {"instruction": "x" * n} for n in (1, 9, 6, 20, 2)]  # n + 1 prompt ids
    kept = [encode_example(examples[i], tokenizer, "plain", 9) for i in (0, 2, 4)]
    assert encode_examples(examples, tokenizer, "plain", max_length=9) == (kept, [0, 2, 4])

def test_control_tokens_spelled_in_data_or_template_stay_text(tokenizer):
    example = {"instruction": f"Say {EOT}", "input": EOT, "output": f"{EOT} no"}
    encoded = encode_example(example, tokenizer)
    assert encoded.ids.count(256) == 1 and encoded.ids[-1] == 256
    assert bytes(encoded.ids[encoded.n_prompt : -1]) == f"{EOT} no".encode()
    special = {EOT: 256, "<|im_end|>": 257, "<|im_start|>": 258, "<|user|>": 259}
    chat = tiktoken.Encoding("chat", pat_str=tokenizer._pat_str, special_tokens=special,
                             mergeable_ranks=tokenizer._mergeable_ranks)
    assert max(encode_example(NO_INPUT, chat, "chatml").ids) == 256

def test_what_records_begin_with_alike_stands_once_and_sees_what_it_saw():
    """In two, in all; one that is all of another's beginning, one twice; with the end in it."""
    torch.manual_seed(0)
    model, ends = gpt.GPT(gpt.GPTConfig(20, 16, 2, 2, 32)), [[1, 2], [1, 3, 3], [1, 2], [9] * 9, []]
    batch = [Encoded([7, 7, *end, 9], 2) for end in ends]
    (inputs, _), tree = collate(batch), data.share_beginnings(batch, 32, torch.float32)
    before = {tuple(e.ids[:n]) for e in batch for n in range(1, len(e.ids))}
    assert len(tree.kept.unique()) == len(before) and len(tree.kept) == 16
    row = model.features(inputs.flatten()[tree.kept][None], tree)[0]  # (N, C)
    for e, places in zip(batch, tree.place.view(inputs.shape)):
        alone = model.features(torch.tensor([e.ids[:-1]]))[0]
        torch.testing.assert_close(row[places[:len(alone)]], alone, rtol=0, atol=1e-5)
    other = [Encoded([*range(23), *range(i, i + 35)], 2) for i in range(100, 3300, 50)]
    worth = [bool(data.share_beginnings(other, C, torch.half)) for C in (1489, 1490)]
    assert worth == [False, True]  # N = 2208, B T = 3648: three quarters at 1489.7

def test_collate_gives_these_inputs_and_targets_and_the_book_s_with_the_loss_on_all():
    batch = [Encoded([1, 2, 3, 4, 9], 2), Encoded([5, 6, 9], 1)]
    inputs, targets = collate(batch)
    assert inputs.tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert targets.tolist() == [[X, 3, 4, 9], [6, 9, X, X]]
    assert inputs.dtype == targets.dtype == torch.int64
    assert collate(batch, ignore_index=-1)[1].tolist() == [[-1, 3, 4, 9], [6, 9, -1, -1]]
    encoded = [Encoded([*b"Do.\n", *b"o" * n, 256], 4) for n in (3, 1, 12)]
    for e, inputs, targets in zip(encoded, *collate(encoded, loss_on="all")):
        padded = e.ids + [256] * (17 - len(e.ids))  # custom_collate_fn of chapter 7
        target = torch.tensor(padded[1:] + [256])[:16]
        target[(target == 256).nonzero().squeeze(1)[1:]] = X
        assert inputs.tolist() == padded[:-1] and torch.equal(targets, target)

def test_batches_hold_every_index_once_and_depend_on_seed_and_epoch_alone():
    lengths = [i * 37 % 50 + 2 for i in range(83)]
    state = data.random.getstate()
    first = batches(lengths, 8, 123, 0)
    assert data.random.getstate() == state and batches(lengths, 8, 123, 0) == first
    assert sorted(sum(first, [])) == list(range(83))
    assert sorted(map(len, first)) == [3] + [8] * 10
    for other in (batches(lengths, 8, 123, 1), batches(lengths, 8, 124, 0)):
        assert {frozenset(b) for b in other} != {frozenset(b) for b in first}  # the members too
    assert batches([], 8, 0, 0) == []
    assert batches([4, 9, 4, 7, 5], 2, seed=123, epoch=0) == [[0, 4], [3, 1], [2]]  # everywhere
    lengths = list(range(2, 402))  # similar lengths together, neither shortest nor longest first
    drawn = batches(lengths, 8, 123, 0)
    assert all(max(batch) - min(batch) == len(batch) - 1 for batch in drawn)
    assert 10 < sum(a[0] < b[0] for a, b in zip(drawn, drawn[1:])) < 40
    places = {[len(b) for b in sorted(batches(lengths[:-3], 8, 123, e))].index(5) for e in range(9)}
    assert len(places) > 3  # the batch that is not full shifts the cuts

def spec(vocab, merges, **changes):
    cut = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    added = [{"id": vocab[EOT], "content": EOT, "special": True}]
    return {"normalizer": None, "pre_tokenizer": cut, "added_tokens": added,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}} | changes

def test_a_folder_makes_the_merges_it_names_and_tokenizer_json_goes_first(tmp_path):
    vocab = byte_vocab(MERGES)
    expected = load_tokenizer(write_tokenizer(tmp_path / "a", vocab, MERGES))
    hello = expected.encode_ordinary("hello hello")
    assert hello == [vocab["hello"], vocab["Ġhell"], ord("o")]
    assert expected.eot_token == vocab[EOT] == expected.n_vocab - 1
    write_tokenizer(tmp_path / "b", byte_vocab(), [])
    for merges in ([list(m) for m in MERGES], [" ".join(m) for m in MERGES]):
        write(tmp_path / "b" / "tokenizer.json", spec(vocab, merges))
        other = load_tokenizer(tmp_path / "b")
        assert other._mergeable_ranks == expected._mergeable_ranks
        assert other._special_tokens == expected._special_tokens
    first = {char: n + 1 for char, n in byte_vocab().items()} | {EOT: 0}  # as `tokenizers` trains
    trained = spec(first, [])
    trained["added_tokens"].append({"id": 257, "content": "<|pad|>", "special": True})
    write(tmp_path / "b" / "tokenizer.json", trained)
    assert load_tokenizer(tmp_path / "b").encode_ordinary("<|pad|>") == [n + 1 for n in b"<|pad|>"]

GOOD_MERGES = [("h", "e"), ("Ġ", "he")]
GOOD = byte_vocab(GOOD_MERGES)
NO_END = {token: i for token, i in GOOD.items() if token != EOT}
CUT, ADDED = (spec(GOOD, GOOD_MERGES)[key] for key in ("pre_tokenizer", "added_tokens"))

def spoilt(**changes):
    return "tokenizer.json", spec(GOOD, GOOD_MERGES, **changes)

BROKEN = {  # a case: a file, its content
    "a byte is missing": ("vocab.json", {"東" if k == "q" else k: i for k, i in GOOD.items()}),
    "two tokens have one id": ("vocab.json", GOOD | {"he": 104}),
    "an id is beyond the end": ("vocab.json", GOOD | {EOT: 9999}),
    "no end token": ("vocab.json", NO_END), "a merge is missing": ("merges.txt", "h e"),
    "merges in another order": ("merges.txt", "Ġ he\nh e"),
    "added_tokens.json": ("added_tokens.json", {"a": 259}),
    "<think>": spoilt(added_tokens=[*ADDED, {"id": 259, "content": "<think>", "special": False}]),
    "no cut": spoilt(pre_tokenizer=None), "a normalizer": spoilt(normalizer={"type": "NFC"}),
    "no regex": spoilt(pre_tokenizer=CUT | {"use_regex": False}),
    "another cut": spoilt(pre_tokenizer=CUT | {"type": "Whitespace"}),
    "a prefix space": spoilt(pre_tokenizer=CUT | {"add_prefix_space": True}),
    "no end token there": spoilt(added_tokens=[], model={"vocab": NO_END, "merges": GOOD_MERGES}),
    "Unigram": spoilt(model={"type": "Unigram", "vocab": [["a", -1.5], ["b", -2.5]]}),
    "nothing": spoilt(model={}, added_tokens=[])}

@pytest.mark.parametrize("case", BROKEN)
def test_a_tokenizer_that_tiktoken_would_take_otherwise_is_refused(tmp_path, monkeypatch, case):
    load_tokenizer(write_tokenizer(tmp_path, GOOD, GOOD_MERGES))
    file, content = BROKEN[case]
    write(tmp_path / file, content)
    monkeypatch.setattr(tiktoken, "Encoding", lambda *a, **k: pytest.fail("tiktoken saw it"))
    with pytest.raises(ValueError, match=f"{tmp_path.name}: not like GPT-2's") as caught:
        load_tokenizer(tmp_path)
    named = [case] if case in ("<think>", "added_tokens.json") else []
    assert str(caught.value).endswith(f"added tokens {named}")

@needs_shared
def test_the_names_of_gpt2_mean_the_tokenizer_of_the_files(tmp_path, monkeypatch, gpt2):
    files = {"merges.txt": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
             "vocab.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"}  # their names in the cache
    for source, cached in files.items():
        shutil.copy(SHARED / "gpt2" / source, tmp_path / cached)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"):
        named = load_tokenizer(name)
        assert named._mergeable_ranks == gpt2._mergeable_ranks
        assert (named._special_tokens, named._pat_str) == (gpt2._special_tokens, gpt2._pat_str)

@needs_shared
def test_ids_equal_those_of_transformers_gpt2_tokenizer_and_its_saved_files_load(tmp_path, gpt2):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    theirs = transformers.GPT2Tokenizer.from_pretrained(SHARED / "gpt2")
    assert (theirs.eos_token_id, len(theirs)) == (gpt2.eot_token, gpt2.n_vocab) == (50256, 50257)
    book = load_examples(SHARED / "instruction-data.json")[:200]
    for text in [format_prompt(e) + e["output"] for e in book] + TEXTS:
        assert gpt2.encode_ordinary(text) == theirs(text)["input_ids"]
        assert gpt2.decode(gpt2.encode_ordinary(text)) == text
    theirs.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)._mergeable_ranks == gpt2._mergeable_ranks

def test_the_tokenizers_files_are_copied_byte_for_byte_and_nothing_else(tmp_path):
    names = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
             "chat_template.jinja"}  # arcee-ai/mergekit#589
    for name in names | {"config.json", "tokenizer/a folder"}:  # sd_dreambooth_extension#270
        write(tmp_path / "a" / name, f"{name}\r\n".encode())
    write(tmp_path / "b" / "config.json", b"mine")
    data.copy_tokenizer(tmp_path / "a", tmp_path / "b")
    copied = {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    assert copied == {n: f"{n}\r\n".encode() for n in names} | {"config.json": b"mine"}

@pytest.fixture
def here(tmp_path, monkeypatch):
    write_tokenizer(tmp_path / "model", byte_vocab(), [])
    rows = [NO_INPUT | {"instruction": "x" * n, "source": "web"} for n in (1, 9, 6, 20, 2)]
    write(tmp_path / "records.json", rows)
    write(tmp_path / "bad.json", [{"instruction": "a\n"}])
    monkeypatch.chdir(tmp_path)
    return ["--data", "records.json", "--model", "model", "--template", "plain"]

def test_the_script_prints_split_notes_lengths_cuts_padding_and_one_example(here, capsys):
    assert data.main([*here, "--max-length", "9"]) == 0
    out = capsys.readouterr().out
    for expected in ("shuffled: 4 train, 1 val, 0 test\n", "fields that nothing uses: source\n",
                     "6 to 9 ids; 1 cut, 2 dropped\n", "padding in batches of 8: 18.5%\n"):
        assert expected in out
    assert out.endswith("x\n>>>No.<|endoftext|><<<\n")

@pytest.mark.parametrize("flags, code, needle", [
    (["--data", "ab\nsent.json"], 1, "no ab sent.json: give JSON, a folder, or tiny, book, alpaca"),
    (["--data", "bad.json"], 1, "bad.json: 1 of 1 records are bad: record 1 (line 1): 0 texts"),
    (["--model", "absent"], 1, "absent/vocab.json"), (["--max-length", "2"], 1, "max_length 2"),
    (["--max-length", "-5"], 1, "max_length -5"), (["--template", "llama"], 2, "--template")])
def test_what_is_wrong_is_one_line_and_1_for_data_2_for_flags(here, capsys, flags, code, needle):
    try:
        assert data.main([*here, *flags]) == code
    except SystemExit as ended:
        assert ended.code == code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") and err.count("\n") == 1 and needle in err

def test_copied_alone_the_script_says_that_the_embedded_data_are_not_there(tmp_path):
    command = [sys.executable, "-I", shutil.copy(ROOT / "data.py", tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "instructions.json" in done.stderr
