"""gpt.py against transformers, torch's own encoder layer, the safetensors library, and itself."""

import hashlib
import http.server
import json
import re
import struct
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gpt
from gpt import (GPT, GPTConfig, KVCache, choose_device, download, generate, locate, model_folder,
                 read_safetensors, sample, write_safetensors)

ROOT = Path(__file__).resolve().parents[1]
SMALL = GPTConfig(vocab_size=61, block_size=24, n_layer=3, n_head=4, n_embd=32)
FIRST = "transformer.h.0.attn.c_attn.weight"
WTE = "transformer.wte.weight"

@pytest.fixture
def model():
    """Weights far from their init, so that no term is invisible, and exact in half precision."""
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.25).mul_(64).round_().div_(64)
    return model

@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"

def ids(*shape, seed=1):
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))

def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

def files(folder):
    return read_safetensors(folder / "model.safetensors")

def edit(folder, change):
    tensors = files(folder)
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)

def test_logits_equal_those_of_transformers_whichever_wrote_the_folder(folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    library = pytest.importorskip("safetensors.torch", reason="save_model is safetensors'")
    edit_config(folder, layer_norm_epsilon=1e-3)
    read, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info  # no missing, unexpected or mismatched key
    new = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=4))
    for path in (tmp_path / "whole", tmp_path / "headed"):
        new.save_pretrained(path)
    library.save_model(new, str(path / "model.safetensors"))  # lm_head.weight, not the tied wte
    assert WTE not in files(path)
    for path, theirs in ((folder, read), (tmp_path / "whole", new), (path, new)):
        ours, x = GPT.from_pretrained(path).eval(), ids(3, 24)
        assert ours.lm_head.weight is ours.wte.weight
        torch.testing.assert_close(ours(x), theirs.eval()(x).logits, atol=2e-6, rtol=0)

def test_a_block_equals_torch_transformer_encoder_layer(model):
    C, block = SMALL.n_embd, model.h[0]
    layer = torch.nn.TransformerEncoderLayer(
        C, SMALL.n_head, 4 * C, dropout=0.0, batch_first=True, norm_first=True,
        activation=lambda x: F.gelu(x, approximate="tanh"))
    names = {"self_attn.in_proj_": "attn.c_attn.", "self_attn.out_proj.": "attn.c_proj.",
             "linear1.": "mlp.c_fc.", "linear2.": "mlp.c_proj.", "norm1.": "ln_1.",
             "norm2.": "ln_2."}
    x = torch.randn(2, 11, C, generator=torch.Generator().manual_seed(3))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(11)
    layer.load_state_dict({theirs + leaf: block.get_parameter(ours + leaf)
                           for theirs, ours in names.items() for leaf in ("weight", "bias")})
    expected = layer(x, src_mask=mask, is_causal=True)
    torch.testing.assert_close(block(x), expected, atol=2e-6, rtol=0)

def test_blocks_run_in_two_parts_give_the_bits_of_one(model):
    x = ids(2, 9)
    assert torch.equal(model.features(x), model.ln_f(model.run_blocks(model.embed(x))))
    for k in range(4):
        hidden = model.run_blocks(model.run_blocks(model.embed(x), 0, k), k)
        assert torch.equal(model.lm_head(model.ln_f(hidden)), model(x))

@pytest.mark.parametrize("n_embd, n_layer, n_head, count", [
    (768, 12, 12, 124_439_808), (1600, 48, 25, 1_557_611_200), (768, 6, 12, 81_912_576)])
def test_parameter_counts_are_those_published(n_embd, n_layer, n_head, count):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_embd=n_embd, n_layer=n_layer, n_head=n_head))
    assert sum(p.numel() for p in model.parameters()) == count

def test_new_weights_have_gpt2_s_spread_and_those_that_add_to_the_residual_stream_less():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, block_size=64, n_layer=8, n_head=2, n_embd=64))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / (4 if name.endswith("c_proj.weight") else 1)
            assert p.std().item() == pytest.approx(std, rel=0.1), name
        else:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name

@pytest.mark.parametrize("site", ["drop", "attn", "attn.resid_dropout", "mlp.dropout"])
def test_dropout_acts_at_each_of_its_four_places_and_in_training_only(folder, site):
    model, x = GPT.from_pretrained(folder, dropout=0.5), ids(2, 8)
    probability = lambda m: {torch.nn.Dropout: "p", gpt.CausalSelfAttention: "dropout"}.get(type(m))
    for module in filter(probability, model.modules()):
        assert getattr(module, probability(module)) == 0.5
        setattr(module, probability(module), 0.0)
    assert torch.equal(model(x), model(x))
    module = model.drop if site == "drop" else model.h[1].get_submodule(site)
    setattr(module, probability(module), 0.5)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))

@torch.no_grad()
def test_cached_logits_equal_full_logits_at_every_split(model):
    x = ids(2, 14)
    for split in range(1, 14):
        cache = KVCache(2, 14)
        parts = [model.features(x[:, :split], cache), model.features(x[:, split:], cache)]
        logits = model.lm_head(torch.cat(parts, dim=1))
        torch.testing.assert_close(logits, model(x), atol=2e-6, rtol=0)

def one_by_one(model, prompt, n):
    """Generation as the definition has it: the whole text again for each token."""
    text = list(prompt)
    while len(text) < min(len(prompt) + n, SMALL.block_size):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt):]

def ended(answers, eos_id):
    return [a[:a.index(eos_id)] if eos_id in a else a for a in answers]

def watch(model):
    """A list of the numbers of tokens that the model is given, call by call."""
    counts = []
    def hook(module, args, output):
        counts.append(args[0].numel())
        assert not output.requires_grad  # nothing is kept for a backward pass
    model.wte.register_forward_hook(hook)
    return counts

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], list(range(20)), list(range(23)),
           *([7, 7, 7, n] for n in range(12))]
ROOM = [9, 9, 9, 4, 1] + [9] * 12  # of nine new ids each; the fourth and fifth fill the block

def test_a_batch_gives_what_each_prompt_gives_alone_and_rows_that_have_ended_cost_nothing(model):
    free, state = [one_by_one(model, p, 9) for p in PROMPTS], torch.random.get_rng_state()
    assert [len(answer) for answer in free] == ROOM
    assert generate(model, PROMPTS, 99) == [one_by_one(model, p, 99) for p in PROMPTS]
    counts = watch(model)
    for eos_id in (None, *{token for answer in free for token in answer}):
        counts.clear()
        stopped = generate(model, PROMPTS, 9, eos_id=eos_id)
        assert stopped == ended(free, eos_id)
        # After the prompts: each answer's tokens, of which the last one is not fed back.
        fed = [min(len(a), room - 1) for a, room in zip(stopped, ROOM)]
        assert sum(counts[1:]) == sum(fed)
    assert torch.equal(torch.random.get_rng_state(), state)  # the likeliest is not drawn

def test_what_all_prompts_begin_with_is_computed_once(model):
    prompts = [[1, 2, 3, 4, 5, n] for n in range(6)] + [[1, 2, 3, 4, 5]]
    expected = [one_by_one(model, p, 5) for p in prompts]
    counts = watch(model)
    assert generate(model, prompts, 5) == expected and counts[:2] == [4, 7 * 2]
    assert generate(model, [prompts[0]] * 3, 5) == [expected[0]] * 3
    assert generate(model, [], 5) == []

class PerRow(torch.nn.Module):
    """As lora.py's layer: `active` has one entry for each row of the batch."""
    def __init__(self, active):
        super().__init__()
        self.active = active

    def forward(self, x):
        assert len(self.active) == len(x)
        return x + torch.tensor(self.active)[:, None, None] * torch.linspace(-1, 1, x.shape[-1])

def test_adapters_chosen_for_each_row_stay_with_their_rows(model):
    prompts, active = [[5, 6, 7, 8]] * 4, [0.0, 1.0, -2.0, 3.0]
    model.h[0].mlp.dropout = layer = PerRow(active)
    expected = []
    for a in active:
        layer.active = [a]
        expected.append(one_by_one(model, prompts[0], 9))
    layer.active = active
    assert generate(model, prompts, 9) == expected
    for eos_id in {e[n] for e in expected for n in (1, 4)}:  # rows leave at different times
        assert generate(model, prompts, 9, eos_id=eos_id) == ended(expected, eos_id)
        assert layer.active is active == [0.0, 1.0, -2.0, 3.0]

def test_generation_has_no_dropout_and_leaves_modules_as_they_were_even_after_errors(model, folder):
    other, rows = GPT.from_pretrained(folder, dropout=0.5), [0.0] * len(PROMPTS)
    other.h[0].eval()
    layer = other.h[2].mlp.dropout = PerRow(rows)
    assert generate(other, PROMPTS, 9) == generate(model, PROMPTS, 9)
    def fail(*args):
        if len(layer.active) < len(rows):  # when some have left
            raise KeyboardInterrupt
    other.ln_f.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate(other, PROMPTS, 9)
    modes = [m.training for m in (other, other.h[1], other.h[0], other.h[0].attn)]
    assert modes == [True, True, False, False] and layer.active is rows

FOUR = [.5, .3, .15, .05]

@pytest.mark.parametrize("odds, options, expected", [  # each share, or how many of equals
    ([1.0] * 6, dict(top_k=2), 2), ([1.0] * 4, dict(top_p=0.5), 2), ([1.0] * 4, dict(top_p=.51), 3),
    (FOUR, dict(top_p=0.6), [.625, .375, 0, 0]), (FOUR, dict(top_p=1.0), FOUR),
    (FOUR, dict(top_k=2, top_p=0.6), [1, 0, 0, 0]), (FOUR[::-1], dict(top_k=2), [0, 0, .375, .625]),
    ([2, 5, 3], dict(temperature=0.0), [0, 1, 0]), ([2, 5, 3], dict(temperature=1e-3), [0, 1, 0]),
    ([2, 5, 3], dict(temperature=0.5, top_k=9), [4 / 38, 25 / 38, 9 / 38]),
    ([8, 2], dict(temperature=2.0), [2 / 3, 1 / 3])])
def test_ids_are_drawn_by_their_odds_from_k_or_the_fewest_that_reach_p(odds, options, expected):
    logits, rng = torch.tensor(odds).log().expand(40_000, -1), torch.Generator().manual_seed(0)
    drawn = sample(logits, **{"temperature": 1.0, "rng": rng, **options})
    share = drawn.bincount(minlength=len(odds)) / 40_000
    if isinstance(expected, int):
        assert share.count_nonzero() == expected
    else:  # within four deviations
        assert share.tolist() == pytest.approx(expected, abs=0.01, rel=0)
        assert [s > 0 for s in share] == [e > 0 for e in expected]

@pytest.mark.parametrize("change", [
    dict(prompts=[[1], []]), dict(prompts=[list(range(24))]), dict(max_new_tokens=0),
    dict(temperature=-1.0), dict(temperature=float("nan")), dict(temperature=1.0, top_k=-1),
    *(dict(temperature=1.0, top_p=p) for p in (0.0, -0.5, 1.5))])
def test_generation_refuses_what_it_cannot_honour(model, change):
    with pytest.raises(ValueError, match="ids are needed|impossible"):
        generate(model, **{"prompts": [[1, 2]], "max_new_tokens": 3, **change})

def test_saving_and_loading_gives_the_same_model(model, folder):
    again = GPT.from_pretrained(folder)
    assert again.config == model.config and again.training
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters()):
        assert name == other and torch.equal(p, q) and q.requires_grad and q.is_contiguous()
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    for given, written in ((None, 60), (5, 5), (0, 0)):
        model.save_pretrained(folder, eos_id=given)
        config = json.loads((folder / "config.json").read_text())
        assert config["eos_token_id"] == written
        assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]

def older(tensors):  # without prefix, and with the mask as buffers
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    for i in range(3):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

def sharded(folder):
    tensors = [*files(folder).items()]
    (folder / "model.safetensors").unlink()
    for i, part in enumerate((tensors[:9], tensors[9:]), 1):
        path = folder / f"model-0000{i}-of-00002.safetensors"
        write_safetensors(path, dict(part))
    return path

@pytest.mark.parametrize("change", [
    sharded, lambda f: edit(f, older),
    lambda f: edit(f, lambda t: t.update({"lm_head.weight": t[WTE].clone()})),
    *(lambda f, dtype=dtype: edit(f, lambda t: t.update({n: p.to(dtype) for n, p in t.items()}))
      for dtype in (torch.float16, torch.bfloat16, torch.float64))])
def test_files_in_other_forms_load_as_the_same_tied_model_in_float32(model, folder, change):
    change(folder)
    edit_config(folder, n_inner=128, activation_function="gelu_pytorch_tanh", n_ctx=7)
    loaded, x = GPT.from_pretrained(folder).eval(), ids(1, 9)
    assert loaded.lm_head.weight is loaded.wte.weight
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded(x), model(x))

def test_the_head_is_tied_untied_or_its_own_as_asked(model, folder, tmp_path):
    untied = GPT.from_pretrained(folder, tie_word_embeddings=False)
    assert untied.lm_head.weight.data_ptr() != untied.wte.weight.data_ptr()
    assert torch.equal(untied.lm_head.weight, untied.wte.weight)
    untied.lm_head.weight.data.mul_(2)
    untied.save_pretrained(tmp_path / "untied")
    edit(folder, lambda t: t.update({"lm_head.weight": t[WTE] * 2}))  # but the config says tied
    for path in (folder, tmp_path / "untied"):
        loaded = GPT.from_pretrained(path)
        assert not loaded.config.tie_word_embeddings
        assert torch.equal(loaded.lm_head.weight, 2 * model.wte.weight)
        assert torch.equal(loaded.wte.weight, model.wte.weight)

@pytest.mark.parametrize("damage, message", [
    (lambda f: sharded(f).unlink(), "Missing.*h.2.ln_1.weight"),
    (lambda f: edit(f, lambda t: t.pop(WTE)), "wte.weight"),
    (lambda f: edit(f, lambda t: t.update(extra=torch.ones(1))), "Unexpected.*extra"),
    (lambda f: edit(f, lambda t: t[FIRST].fill_(float("nan"))), "h.0.attn.c_attn.weight .*NaN"),
    (lambda f: edit(f, lambda t: t.update({FIRST: t[FIRST].double() * 1e300})), "weight .*inf"),
    (lambda f: edit(f, lambda t: t.update({FIRST: t[FIRST].long()})), "c_attn.weight .*integers"),
    (lambda f: edit(f, lambda t: t.update({"wte.weight": t[WTE] * 2})), "wte.weight is there tw"),
    (dict(n_positions=23), "mismatch for wpe.weight"), (dict(model_type="llama"), "type 'llama'"),
    (dict(tie_word_embeddings=False), "Missing.*lm_head.weight"),
    (dict(activation_function="relu"), "activation_function 'relu'"),
    (dict(scale_attn_weights=False), "scale_attn_weights False"),
    (dict(scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx True"),
    (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    (lambda f: (f / "model.safetensors").unlink(), "no model, nor tiny, gpt2"),
    (lambda f: (f / "model.safetensors").rename(f / "x.bin"), "a pickle: save it again"),
    (lambda f: (f / "config.json").rename(f / "hparams.json"), "TensorFlow"),
    (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "merge it first"),
    (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "git lfs pull")])
def test_a_folder_that_lies_or_is_of_another_kind_is_refused_by_name(folder, damage, message):
    edit_config(folder, **damage) if isinstance(damage, dict) else damage(folder)
    with pytest.raises((ValueError, OSError), match=f"(?s){folder}.*{message}"):
        GPT.from_pretrained(folder)

def test_unmerged_adapters_are_not_saved_away_in_silence(model, tmp_path):
    model.h[0].attn.c_attn.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="h.0.attn.c_attn.lora_A"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", base_only=True)
    assert torch.equal(GPT.from_pretrained(tmp_path / "x").wte.weight, model.wte.weight)

def test_runs_are_located_with_their_adapter_and_their_base(folder, tmp_path):
    run, adapter, base = tmp_path, tmp_path / "adapter", tmp_path / "base"
    assert model_folder(run) == folder and locate(str(run)) == locate(folder) == (folder, None)
    adapter.mkdir()
    assert locate(run) == (folder, adapter)  # a hybrid run
    pytest.raises(OSError, model_folder, run).match("merge it first")
    folder.rename(base)
    for given, expected in (("tiny", ROOT / "tiny" / "model"), (str(base), base)):
        (run / "run.json").write_text(json.dumps({"flags": {"model": given}}))
        assert locate(run) == (expected, adapter)
    pytest.raises(FileNotFoundError, locate, "no").match("no: no model, nor tiny, .*distilgpt2$")

def test_safetensors_round_trip_and_agree_with_the_library(tmp_path):
    ours, theirs = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    tensors = {"a": torch.randn(3, 5).t(), "b": torch.arange(7), "d": torch.zeros(0, 4),
               "c": torch.tensor(2.5, dtype=torch.bfloat16), "e": torch.tensor([True, False]),
               "é": torch.randn(2).half(), "f": torch.randn(3).double(),
               "g": torch.tensor([1, 255], dtype=torch.uint8)}
    same = lambda read: set(read) == set(tensors) and all(
        torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())
    write_safetensors(ours, tensors)
    assert same(read_safetensors(ours)) and ours.read_bytes()[0] % 8 == 0  # aligned
    library = pytest.importorskip("safetensors.torch", reason="the oracle is safetensors")
    assert same(library.load_file(ours))
    library.save_file({n: t.contiguous() for n, t in tensors.items()}, theirs)
    assert same(read_safetensors(theirs))
    ours.write_bytes(raw(json.dumps({"a": entry(0, 4)}).encode() + b"   ", struct.pack("<f", 1.5)))
    assert read_safetensors(ours)["a"].tolist() == [1.5]  # at an odd address

def raw(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body

def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}

MALFORMED = [
    b"", raw(b"{}", length=2**63), raw(b"[1]"), raw(b"{}\0\0"), raw({"a": {}}, b"1234"),
    raw({"a": entry(0, 4)}, b"123"), raw({"a": entry(4, 8)}, b"1234"),  # cut short
    raw({"a": entry(0, 8)}, b"12345678"), raw({"a": entry(4, 0)}, b"1234"),
    raw({"a": entry(0, 1, dtype="F4")}, b"1"), raw({"a": entry(0, 4, [-1, -1])}, b"1234"),
    raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")]  # deep nesting

@pytest.mark.parametrize("content", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_safetensors_are_one_clear_error(tmp_path, content):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match="bad: no safetensors file"):
        read_safetensors(tmp_path / "bad")

def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    pytest.raises(OSError, write_safetensors, path, {"a": torch.ones(2, device="meta")})
    pytest.raises(TypeError, gpt.write_json, path, {"a": object()})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]

BODY = bytes(range(256)) * 1000
FILES = ["config.json", "vocab.json", "merges.txt", "model.safetensors"]

class Handler(http.server.BaseHTTPRequestHandler):
    log_message = lambda *_: None
    def do_GET(self):
        self.server.requests.append(self.path)
        self.server.answer(self)

    def send(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.answer = [], lambda handler: handler.send(BODY)
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()

def hub(handler, size=len(BODY), body=BODY):
    """As the Hugging Face hub: its redirect names size and sha256, its CDN another hash."""
    if handler.path == "/cdn":
        return handler.send(body, ETag='"' + "ab" * 32 + '"')
    etag = f'"{hashlib.sha256(BODY).hexdigest()}"'
    handler.send(b"", 302, Location="/cdn", X_Linked_Size=str(size), X_Linked_Etag=etag)

@pytest.mark.parametrize("answer, message", [
    (lambda h: h.send(b"no", 404), "404"), (lambda h: h.close_connection, "closed"),
    (lambda h: h.send(BODY, Content_Length=len(BODY) + 1), "not the file"),
    (lambda h: h.send(b"Please log in", Content_Type="text/html; charset=utf-8"), "not the file"),
    (lambda h: hub(h, size=len(BODY) - 1), "not the file"),
    (lambda h: hub(h, body=bytes(len(BODY))), "not the file")])
def test_a_file_arrives_whole_and_alone_or_is_one_clear_error_that_leaves_the_old_one(
        server, tmp_path, answer, message):
    plain, server.answer = server.answer, answer
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match=f"{server.url}/file: .*{message}.*{tmp_path} yourself"):
        download(f"{server.url}/file", tmp_path / "file")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]
    for server.answer in (plain, hub):
        download(f"{server.url}/file", tmp_path / "file")
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", BODY)]

def test_a_published_model_is_fetched_once_into_the_cache(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/hub/")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for owner, name in (("openai-community", "gpt2-medium"), ("distilbert", "distilgpt2")):
        folder, server.requests = tmp_path / "gpt2-finetune" / name, []
        assert model_folder(name) == model_folder(name) == folder
        assert server.requests == [f"/hub/{owner}/{name}/resolve/main/{file}" for file in FILES]
    (folder / "merges.txt").unlink()
    server.answer = lambda handler: handler.send(b"", 404)
    assert gpt.main(["--model", "distilgpt2", "--prompt", "x"]) == 1
    assert re.fullmatch("error: .*merges.txt: HTTP Error 404.*\n", capsys.readouterr().err)
    monkeypatch.delenv("HF_HOME")
    with pytest.raises(OSError, match="home/.cache/huggingface/gpt2-finetune/gpt2 yourself"):
        model_folder("gpt2")

def test_the_device_is_chosen_by_name_and_by_what_is_there(monkeypatch):
    there, asked = [None, torch.device("cuda")], []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: there[0])
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    def zeros(n, device):
        asked.append(device)
        raise RuntimeError("no NVIDIA driver")
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setenv("LOCAL_RANK", "3")
    del there[0]
    for name in ("auto", "cuda", "cuda:1", "gpu"):
        pytest.raises(ValueError, choose_device, name).match("--device")
    assert asked == ["cuda:3", "cuda:3", "cuda:1", "gpu"]

def test_where_onednn_multiplies_short_texts_on_a_cpu_go_without_the_flash_kernel():
    for torch.backends.mkldnn.matmul.fp32_precision, length, flash in (
            ("none", 100, True), ("bf16", 256, False), ("bf16", 257, True)):
        gpt.choose_attention(length)
        assert torch.backends.cuda.flash_sdp_enabled() == flash

def test_freed_memory_is_kept_by_glibc_and_onednn_and_the_user_s_limits_win(monkeypatch):
    calls, old_glibc = [], lambda *args: calls.append(args) or int(args[1] != 1 << 30)
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    for library in (type("Glibc", (), {"mallopt": old_glibc}), object()):  # musl has none
        monkeypatch.setattr(gpt.ctypes, "pythonapi", library)
        gpt.keep_freed_memory()
    gpt.use_onednn()
    assert calls == [(-3, 1 << 30), (-3, 32 << 20), (-1, -1)]
    assert gpt.os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "24"
    assert gpt.os.environ["LRU_CACHE_CAPACITY"] == "7"

def test_the_command_line_continues_a_text_and_names_what_is_wrong(capsys, monkeypatch):
    options, true = [], gpt.generate
    monkeypatch.setattr(gpt, "generate", lambda *a, **k: options.append(k) or true(*a, **k))
    assert gpt.main(["--prompt", "The capital of France is", "--max-new-tokens", "5"]) == 0
    assert re.match("(?s)The capital of France is.{5}", capsys.readouterr().out)
    flags = ["--prompt", "The", "--temperature", "2", "--top-k", "9", "--top-p", "0.9", "--seed"]
    texts = [(gpt.main([*flags, seed]), capsys.readouterr().out) for seed in "112"]
    assert texts[0] == texts[1] != texts[2] and {o["eos_id"] for o in options} == {2047}
    for wrong in ([""], ["a", "--top-k", "-3"], ["a", "--model", "x"]):
        assert gpt.main(["--prompt", *wrong]) == 1
        assert re.fullmatch("error: .*\n", capsys.readouterr().err)
    pytest.raises(SystemExit, gpt.main, []).match("2")
    monkeypatch.setitem(sys.modules, "lora", None)  # as when gpt.py is copied alone
    assert gpt.main(["--prompt", "a"]) == 1 and "lora" in capsys.readouterr().err
