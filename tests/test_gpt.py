"""gpt.py against transformers, torch's own encoder layer, the safetensors library, and itself."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gpt
from gpt import GPT, GPTConfig, KVCache, generate, read_safetensors, sample, write_safetensors

ROOT = Path(__file__).resolve().parents[1]
TINY = GPTConfig(vocab_size=61, block_size=24, n_layer=3, n_head=4, n_embd=32)


@pytest.fixture
def model():
    return random_model(TINY)


def random_model(config, seed=0):
    """Weights far from their init, biases and norms too, so that no term of the forward pass is invisible."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def ids(*shape, seed=1):
    return torch.randint(0, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = read_safetensors(folder / "model.safetensors")
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


# ------------------------------------------------------------------------------ the forward pass


def test_logits_equal_those_of_transformers(folder, model):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info  # no missing, unexpected or mismatched key
    x = ids(3, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs.eval()(x).logits, atol=2e-6, rtol=0)


def test_a_folder_saved_by_transformers_loads_with_its_logits(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=4, layer_norm_epsilon=1e-3)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    x = ids(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(tmp_path).eval()(x), theirs(x).logits, atol=2e-6, rtol=0)


def test_a_block_equals_torch_transformer_encoder_layer(model):
    C, block = TINY.n_embd, model.h[0]
    gelu_tanh = lambda x: F.gelu(x, approximate="tanh")
    layer = torch.nn.TransformerEncoderLayer(C, TINY.n_head, 4 * C, dropout=0.0, activation=gelu_tanh, batch_first=True, norm_first=True)
    pairs = [(layer.self_attn.in_proj_weight, block.attn.c_attn.weight), (layer.self_attn.in_proj_bias, block.attn.c_attn.bias),
             (layer.self_attn.out_proj.weight, block.attn.c_proj.weight), (layer.self_attn.out_proj.bias, block.attn.c_proj.bias),
             (layer.linear1.weight, block.mlp.c_fc.weight), (layer.linear1.bias, block.mlp.c_fc.bias),
             (layer.linear2.weight, block.mlp.c_proj.weight), (layer.linear2.bias, block.mlp.c_proj.bias),
             (layer.norm1.weight, block.ln_1.weight), (layer.norm1.bias, block.ln_1.bias),
             (layer.norm2.weight, block.ln_2.weight), (layer.norm2.bias, block.ln_2.bias)]
    x = torch.randn(2, 11, C, generator=torch.Generator().manual_seed(3))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(11)
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(ours)
        torch.testing.assert_close(block(x), layer(x, src_mask=mask, is_causal=True), atol=2e-6, rtol=0)


def test_changing_a_later_token_never_changes_earlier_logits(model):
    x = ids(1, 12)
    y = x.clone()
    y[0, 7] = (y[0, 7] + 1) % TINY.vocab_size
    with torch.no_grad():
        a, b = model(x), model(y)
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("size, count", [
    ((768, 12, 12), 124_439_808), ((1024, 24, 16), 354_823_168), ((1280, 36, 20), 774_030_080),
    ((1600, 48, 25), 1_557_611_200), ((768, 6, 12), 81_912_576),
])
def test_parameter_counts_are_those_published(size, count):
    n_embd, n_layer, n_head = size
    with torch.device("meta"):
        model = GPT(GPTConfig(n_embd=n_embd, n_layer=n_layer, n_head=n_head))
    assert sum(p.numel() for p in model.parameters()) == count


def test_a_model_without_weights_is_made_without_drawing_them(monkeypatch):
    """On the meta device torch imports its compiler to draw from a normal distribution, a second for every start."""
    monkeypatch.setattr(torch.nn.init, "normal_", None)
    with torch.device("meta"):
        assert GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8)).wte.weight.shape == (50257, 8)


def test_the_tied_head_is_the_embedding_and_an_untied_one_is_not(folder):
    tied, untied = GPT.from_pretrained(folder), GPT.from_pretrained(folder, tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight
    assert torch.equal(untied.lm_head.weight, untied.wte.weight)
    assert not untied.config.tie_word_embeddings


def test_dropout_acts_in_training_only(folder):
    model = GPT.from_pretrained(folder, dropout=0.5)
    x = ids(1, 8)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("sizes", [dict(n_head=5), dict(n_layer=0), dict(n_embd=1.5), dict(dropout=1.0), dict(vocab_size=True)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        GPTConfig(**{"n_embd": 32, "n_head": 4, **sizes})


# ------------------------------------------------------------------------------ cache and generation


def test_cached_logits_equal_full_logits_at_every_split(model):
    x = ids(2, 14)
    with torch.no_grad():
        full = model(x)
        for split in range(1, 14):
            cache = KVCache(TINY, 2, 14)
            parts = [model.features(x[:, :split], cache), model.features(x[:, split:], cache)]
            torch.testing.assert_close(model.lm_head(torch.cat(parts, dim=1)), full, atol=2e-6, rtol=0)


def test_positions_beyond_the_block_are_refused_with_and_without_cache(model):
    with pytest.raises(ValueError, match="25 positions do not fit into 24"):
        model(ids(1, 25))
    cache = KVCache(TINY, 1, 10)
    model.features(ids(1, 10), cache)
    with pytest.raises(ValueError, match="11 positions do not fit into 10"):
        model.features(ids(1, 1), cache)


def one_by_one(model, prompt, n, eos_id=None):
    """Generation as the definition has it: the whole text again for each token."""
    text = list(prompt)
    while len(text) < len(prompt) + n and len(text) < TINY.block_size:
        with torch.no_grad():
            token = int(model(torch.tensor([text]))[0, -1].argmax())
        if token == eos_id:
            break
        text.append(token)
    return text[len(prompt):]


PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], list(range(20)), list(range(23))]


def test_a_batch_of_different_lengths_gives_what_each_prompt_gives_alone(model):
    answers = generate(model, PROMPTS, 9)
    assert answers == [one_by_one(model, p, 9) for p in PROMPTS]
    assert [len(a) for a in answers] == [9, 9, 9, 4, 1]  # the last two fill the block


def test_each_row_stops_at_its_eos_which_is_not_returned(model):
    free = generate(model, PROMPTS, 9)
    for eos_id in {free[0][4], free[1][2], free[2][0]}:
        stopped = generate(model, PROMPTS, 9, eos_id=eos_id)
        assert stopped == [a[:a.index(eos_id)] if eos_id in a else a for a in free]
        assert stopped != free


def test_generation_leaves_the_modes_of_the_modules_alone(model):
    model.train()
    model.h[0].eval()
    generate(model, PROMPTS, 2)
    assert model.training and model.h[1].training and not model.h[0].training and not model.h[0].attn.training


def test_sampling_is_reproducible_by_seed_and_varies_with_it(model):
    draw = lambda seed: generate(model, PROMPTS, 8, temperature=1.5, seed=seed)
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def uniform(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(0))


def test_rows_that_have_ended_cost_nothing_and_change_no_other_row(model):
    prompts = [*PROMPTS, *([7, 7, 7, n] for n in range(12))]
    for sampling in ({}, {"temperature": 1.5, "seed": 3}):
        free = generate(model, prompts, 9, **sampling)
        computed = []
        handle = model.wte.register_forward_hook(lambda module, args, output: computed.append(args[0].numel()))
        for eos_id in {a[3] for a in free if len(a) > 3}:
            computed.clear()
            stopped = generate(model, prompts, 9, eos_id=eos_id, **sampling)
            assert stopped == [a[:a.index(eos_id)] if eos_id in a else a for a in free]
            # After the prompts: for each answer its tokens, of which the last ends it and is not fed back.
            fed = [min(len(a), room - 1) for a, room in zip(stopped, [9, 9, 9, 4, 1] + [9] * 12)]
            assert sum(computed[1:]) == sum(fed)
        handle.remove()


def test_what_all_prompts_begin_with_is_computed_once(model):
    prompts = [[1, 2, 3, 4, 5, n] for n in range(6)] + [[1, 2, 3, 4, 5]]
    computed = []
    handle = model.wte.register_forward_hook(lambda module, args, output: computed.append(args[0].numel()))
    answers = generate(model, prompts, 5)
    handle.remove()
    assert answers == [one_by_one(model, p, 5) for p in prompts]
    assert computed[:2] == [4, 7 * 2]
    assert generate(model, [prompts[0]] * 3, 5) == [answers[0]] * 3


def test_unused_places_of_the_cache_may_hold_anything(model, monkeypatch):
    wanted = generate(model, PROMPTS[:3], 9)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.full(*size, torch.nan, **options))
    assert generate(model, PROMPTS[:3], 9) == wanted


def test_top_k_keeps_k_candidates_also_among_equals():
    logits = torch.zeros(4000, 6)
    drawn = sample(logits, 1.0, 2, None, uniform(4000)).unique()
    assert len(drawn) == 2


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    assert sample(logits, 1.0, None, 0.4, uniform(4000)).unique().tolist() == [0]
    assert sample(logits, 1.0, None, 0.6, uniform(4000)).unique().tolist() == [0, 1]
    assert sample(logits, 1.0, None, 1.0, uniform(4000)).unique().tolist() == [0, 1, 2, 3]
    flat, u = torch.randn(50, 50257, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1e-5, 50)
    assert torch.equal(sample(flat, 1.0, None, 1.0, u), sample(flat, 1.0, None, None, u))  # rounding takes nothing out
    extremes = torch.tensor([0.0, 1 - 2**-24])  # also there no token is drawn that top_p has taken out
    assert sample(logits[:2], 1.0, None, 0.6, extremes).tolist() == [1, 0]


def test_temperature_scales_the_logits():
    logits = torch.tensor([[0.0, 2.0]]).expand(20000, 2)
    share = sample(logits, 2.0, None, None, uniform(20000)).float().mean()
    assert abs(share - torch.sigmoid(torch.tensor(1.0))) < 0.01


@pytest.mark.parametrize("change, message", [
    (dict(prompts=[[1], []]), "prompt 1 is empty"), (dict(prompts=[list(range(24))]), "no room"),
    (dict(prompts=[[61]]), "outside the vocabulary"), (dict(prompts=[[-1]]), "outside the vocabulary"),
    (dict(max_new_tokens=0), "max_new_tokens"), (dict(temperature=-1.0), "temperature"),
    (dict(temperature=float("nan")), "temperature"), (dict(temperature=1.0, top_k=0), "top_k"),
    (dict(temperature=1.0, top_p=0.0), "top_p"), (dict(temperature=1.0, top_p=1.5), "top_p"), (dict(top_k=3), "no effect"),
])
def test_generation_refuses_what_it_cannot_honour(model, change, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": [[1, 2]], "max_new_tokens": 3, **change})


# ------------------------------------------------------------------------------ the model folder


def test_saving_and_loading_gives_the_same_model(model, folder):
    again = GPT.from_pretrained(folder).eval()
    assert again.config == model.config
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters()):
        assert name == other and torch.equal(p, q)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_files_of_every_float_dtype_load_as_float32(model, folder, dtype):
    edit_tensors(folder, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    loaded = GPT.from_pretrained(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.h[1].mlp.c_fc.weight, model.h[1].mlp.c_fc.weight.to(dtype).float())


def test_old_files_without_prefix_and_with_mask_buffers_load(model, folder):
    def older(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(3):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    edit_tensors(folder, older)
    x = ids(1, 9)
    assert torch.equal(GPT.from_pretrained(folder).eval()(x), model(x))


def test_a_head_that_equals_the_embedding_is_tied_and_one_that_differs_is_kept(model, folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    assert GPT.from_pretrained(folder).config.tie_word_embeddings
    edit_tensors(folder, lambda t: t["lm_head.weight"].mul_(2))
    loaded = GPT.from_pretrained(folder)
    assert not loaded.config.tie_word_embeddings and torch.equal(loaded.lm_head.weight, 2 * model.wte.weight)
    with pytest.raises(ValueError, match="cannot be tied"):
        GPT.from_pretrained(folder, tie_word_embeddings=True)


def shard(folder):
    tensors = read_safetensors(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        write_safetensors(folder / file, {n: tensors[n] for n in part})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def test_a_sharded_folder_loads(model, folder):
    shard(folder)
    x = ids(1, 9)
    assert torch.equal(GPT.from_pretrained(folder).eval()(x), model(x))


def edit_index(folder, change):
    shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


FIRST = "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize("damage, error, message", [
    (lambda f: edit_tensors(f, lambda t: t.pop(FIRST)), ValueError, "1 missing tensor: h.0.attn.c_attn.weight"),
    (lambda f: edit_tensors(f, lambda t: t.update(extra=torch.ones(1))), ValueError, "1 unexpected tensor: extra"),
    (lambda f: edit_tensors(f, lambda t: t.update({FIRST: t[FIRST].t()})), ValueError, "c_attn.weight has shape"),
    (lambda f: edit_tensors(f, lambda t: t[FIRST].fill_(float("nan"))), ValueError, "c_attn.weight holds NaN"),
    (lambda f: edit_tensors(f, lambda t: t[FIRST][0, 0].fill_(float("inf"))), ValueError, "holds NaN or inf"),
    (lambda f: edit_tensors(f, lambda t: t.update({FIRST: t[FIRST].double().fill_(1e300)})), ValueError, "holds NaN or inf"),
    (lambda f: edit_tensors(f, lambda t: t.update({"wte.weight": t["transformer.wte.weight"]})), ValueError, "there twice"),
    (lambda f: edit_config(f, n_layer=2), ValueError, "12 unexpected tensors: h.2.*\\.\\.\\."),
    (lambda f: edit_config(f, n_layer=4), ValueError, "12 missing tensors: h.3"),
    (lambda f: edit_config(f, tie_word_embeddings=False), ValueError, "missing tensor: lm_head.weight"),
    (lambda f: edit_config(f, model_type="llama"), ValueError, "model_type 'llama'"),
    (lambda f: edit_config(f, activation_function="relu"), ValueError, "activation_function 'relu'"),
    (lambda f: edit_config(f, scale_attn_weights=False), ValueError, "scale_attn_weights False"),
    (lambda f: edit_config(f, scale_attn_by_inverse_layer_idx=True), ValueError, "scale_attn_by_inverse_layer_idx"),
    (lambda f: edit_config(f, add_cross_attention=True), ValueError, "add_cross_attention"),
    (lambda f: edit_config(f, n_inner=100), ValueError, "n_inner 100"),
    (lambda f: edit_config(f, n_embd="32"), ValueError, "n_embd"),
    (lambda f: edit_config(f, n_head=7), ValueError, "not a multiple"),
    (lambda f: edit_config(f, resid_pdrop=0.3), ValueError, "differ"),
    (lambda f: edit_config(f, layer_norm_epsilon="x"), ValueError, "layer_norm_epsilon"),
    (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
    (lambda f: (f / "config.json").write_text("{"), ValueError, "not JSON"),
    (lambda f: (f / "config.json").write_text("[]"), ValueError, "not a JSON object"),
    (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "no model.safetensors"),
    (lambda f: edit_index(f, lambda m: m.update({FIRST: "../x.safetensors"})), ValueError, "not a plain file name"),
    (lambda f: edit_index(f, lambda m: m.update({FIRST: "gone.safetensors"})), FileNotFoundError, "is missing"),
    (lambda f: edit_index(f, lambda m: m.pop(FIRST)), ValueError, "unexpected tensor"),
    (lambda f: edit_index(f, lambda m: m.clear()), ValueError, "no weight_map"),
])
def test_a_folder_that_lies_is_refused_by_name(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        GPT.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_unmerged_adapters_are_not_saved_away_in_silence(model, tmp_path):
    model.h[0].attn.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="h.0.attn.lora_A"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", base_only=True)
    assert torch.equal(GPT.from_pretrained(tmp_path / "x").wte.weight, model.wte.weight)


def test_unknown_overrides_are_refused(folder):
    with pytest.raises(ValueError, match="n_layer"):
        GPT.from_pretrained(folder, n_layer=2)


# ------------------------------------------------------------------------------ safetensors


def test_safetensors_round_trip_and_agree_with_the_library(tmp_path):
    tensors = {"a": torch.randn(3, 5).t(), "b": torch.arange(7), "c": torch.tensor(2.5, dtype=torch.bfloat16),
               "d": torch.zeros(0, 4), "e": torch.tensor([True, False]), "é": torch.randn(2).half(), "f": torch.randn(3).double(),
               "g": torch.tensor([1, 255], dtype=torch.uint8), "h": torch.arange(3, dtype=torch.int32)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    ours = read_safetensors(tmp_path / "x.safetensors")
    assert set(ours) == set(tensors)
    assert all(torch.equal(ours[n], t) and ours[n].dtype == t.dtype for n, t in tensors.items())
    library = pytest.importorskip("safetensors.torch", reason="the oracle is the safetensors library")
    theirs = library.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(theirs[n], t) for n, t in tensors.items())
    library.save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "y.safetensors")
    assert all(torch.equal(t, tensors[n]) for n, t in read_safetensors(tmp_path / "y.safetensors").items())


def raw(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


MALFORMED = {
    "empty": b"", "seven bytes": b"1234567", "no header": raw(b""), "huge length": raw(b"{}", length=2**63),
    "length past the end": raw(b"{}", length=99), "not utf-8": raw(b"\xff\xfe{}"), "cut json": raw(b'{"a":'),
    "a list": raw(b"[1]"), "a number": raw(b"12"), "trailing nul": raw(b"{}\0\0"), "truncated body": raw({"a": entry(0, 4)}, b"123"),
    "one byte too many": raw({"a": entry(0, 4)}, b"12345"), "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n",
    "html": b"<!DOCTYPE html><html><body>404</body></html>", "size mismatch": raw({"a": entry(0, 8)}, b"12345678"),
    "end before begin": raw({"a": entry(4, 0)}, b"1234"), "negative": raw({"a": entry(-4, 0)}, b""),
    "float offsets": raw({"a": entry(0.0, 4.0)}, b"1234"), "bool shape": raw({"a": entry(0, 4, [True])}, b"1234"),
    "hole": raw({"a": entry(0, 4), "b": entry(8, 12)}, b"1" * 12), "hole at the start": raw({"a": entry(4, 8)}, b"1" * 8),
    "overlap": raw({"a": entry(0, 4), "b": entry(2, 6)}, b"1" * 6), "same range": raw({"a": entry(0, 4), "b": entry(0, 4)}, b"1" * 4),
    "unknown dtype": raw({"a": entry(0, 1, dtype="F4")}, b"1"), "overflowing shape": raw({"a": entry(0, 4, [2**62, 2**62])}, b"1234"),
    "metadata not text": raw({"__metadata__": {"a": 1}}), "metadata a list": raw({"__metadata__": [1]}),
    "missing field": raw({"a": {"dtype": "F32", "shape": [1]}}, b"1234"), "three offsets": raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1, 4]}}, b"1234"),
    "duplicate key": raw(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "deep nesting": raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "shape of text": raw({"a": entry(0, 4, "ab")}, b"1234"),
    "zip": b"PK\x03\x04" + b"\0" * 60,
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_safetensors_are_one_clear_error(tmp_path, case):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(MALFORMED[case])
    with pytest.raises(ValueError, match="bad.safetensors") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_headers_of_any_length_and_empty_files_are_valid(tmp_path):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(raw(json.dumps({"a": entry(0, 4)}).encode() + b"   ", struct.pack("<f", 1.5)))
    assert read_safetensors(path)["a"].tolist() == [1.5]
    path.write_bytes(raw(b"{}"))
    assert read_safetensors(path) == {}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(2)})
    with pytest.raises(NotImplementedError):
        write_safetensors(path, {"a": torch.ones(2, device="meta")})
    assert read_safetensors(path)["a"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


# ------------------------------------------------------------------------------ files on their own


@pytest.mark.parametrize("name", ["gpt", "data", "freeze", "lora", "evaluate"])
def test_each_file_can_be_copied_alone(tmp_path, name):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    result = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_config_without_dropout_means_gpt2_s_own(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if not key.endswith("_pdrop")}))
    assert GPT.from_pretrained(folder).config.dropout == 0.1 and GPT.from_pretrained(folder, dropout=0.0).config.dropout == 0
    edit_config(folder, attn_pdrop=0.2)
    with pytest.raises(ValueError, match="differ: give one dropout"):
        GPT.from_pretrained(folder)


def test_the_end_token_in_the_config_is_the_last_id_or_the_one_given_also_if_that_is_0(model, tmp_path):
    for given, written in ((None, 60), (5, 5), (0, 0)):
        model.save_pretrained(tmp_path / str(given), eos_id=given)
        config = json.loads((tmp_path / str(given) / "config.json").read_text())
        assert config["eos_token_id"] == config["bos_token_id"] == written


def test_top_p_takes_nothing_beyond_the_token_with_which_p_is_reached():
    u = (torch.arange(100) + 0.5) / 100
    assert len(set(sample(torch.zeros(100, 4), 1.0, None, 0.5, u).tolist())) == 2  # each has exactly a quarter
    assert len(set(sample(torch.zeros(100, 4), 1.0, None, 0.51, u).tolist())) == 3


@pytest.mark.parametrize("site", ["drop", "attn", "attn.resid_dropout", "mlp.dropout"])
def test_dropout_acts_at_each_of_its_four_places(model, site):
    model.train()
    block = model.h[1]
    if site == "attn":
        block.attn.dropout = 0.5  # on the probabilities
    else:
        (model.drop if site == "drop" else block.get_submodule(site)).p = 0.5
    x = ids(2, 8)
    assert not torch.equal(model(x), model(x))
    same = torch.equal(model.hidden_states(x, 1), model.hidden_states(x, 1))  # what enters block 1
    assert same == (site != "drop")


def test_new_weights_have_gpt2_s_spread_and_those_that_write_to_the_residual_stream_less():
    torch.manual_seed(0)
    for name, p in GPT(GPTConfig(vocab_size=300, block_size=64, n_layer=8, n_head=2, n_embd=64)).named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02 / (4 if name.endswith("c_proj.weight") else 1), rel=0.1), name
        else:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name


def test_a_cache_longer_than_the_block_does_not_make_room(model):
    with pytest.raises(ValueError, match="25 positions do not fit into 24"):
        model.features(ids(1, 25), KVCache(TINY, 1, 99))
