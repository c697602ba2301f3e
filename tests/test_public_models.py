"""Public reports on model folders, adapters and tokenizers (github.com), a line a case: the input,
and whether it loads, or what the one error says."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import data
import gpt
import lora
from gpt import GPT, read_json, read_safetensors, write_safetensors
from test_lora import IDS, random_model, trained

TINY = Path(gpt.__file__).with_name("tiny") / "model"
C_FC, WTE = "transformer.h.0.mlp.c_fc.weight", "transformer.wte.weight"

def adapted():
    """Write an adapter that changes the logits to `adapter`."""
    model = trained(random_model())
    lora.save_lora(model, "adapter")
    return model

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The model's folder `model`, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    random_model().save_pretrained("model", eos_id=7)
    return Path("model")

def change_json(path, drop=(), **changes):
    known = read_json(path) | changes
    path.write_text(json.dumps({key: v for key, v in known.items() if key not in drop}))

def config(*drop, **changes):
    return lambda folder: change_json(folder / "config.json", drop, **changes)

def tensors(change, file="model.safetensors"):
    return lambda folder: write_safetensors(folder / file, change(read_safetensors(folder / file)))

def renamed(old, new):
    return lambda t: {name.replace(old, new): p for name, p in t.items()}

def more(name, *shape):
    return lambda t: t | {name: torch.ones(*shape)}

def linked(folder):  # as snapshots/HASH of the hub's cache
    Path("blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(Path("blobs", str(i)))
        path.symlink_to(Path("..", "blobs", str(i)))

def file(name, content):
    return lambda folder: (folder / name).write_bytes(content)

def packed(t):  # 4 bits, by bitsandbytes
    bits = torch.zeros(512, 1, dtype=torch.uint8)
    return t | {C_FC: bits, C_FC + ".absmax": torch.ones(18), C_FC + ".quant_map": torch.ones(16)}

def linear(t):  # [out, in], as nanoGPT has them
    return {n: p.t() if n.endswith(gpt.CONV1D) else p for n, p in t.items()}

def adapter_beside(folder):
    adapted()
    shutil.copytree("adapter", folder, dirs_exist_ok=True)

@pytest.mark.parametrize("report, change, message", [  # None: it loads
    ("huggingface_hub#1388", linked, None),
    ("SceneWorks#1333", file("._model.safetensors", b"\0\5\x16\7Mac OS X"), None),
    ("CoSER#3", file("model.safetensors.index.json", b'{"weight_map": {"a": "b"}}'), None),
    ("transformers#26729", file("pytorch_model.bin", b"PK older weights"), None),
    ("transformers#13573, transformers#7275",
     config(reorder_and_upcast_attn=True, pad_token_id=0, eos_token_ids=0, n_ctx=99), None),
    ("transformers#3799", config("tie_word_embeddings", "architectures"), None),
    ("nanoGPT#325, sentence-transformers#3865",
     tensors(renamed("transformer.", "_orig_mod.transformer.")), "Missing.*wpe.weight"),
    ("peft#2092", tensors(renamed("c_fc.", "c_fc.base_layer.")), "Unexpected.*c_fc.base_layer"),
    ("mlx-vlm#1464", lambda folder: write_safetensors(
        folder / "model-00002-of-00002.safetensors", {C_FC: torch.zeros(16, 64)}),
     "h.0.mlp.c_fc.weight is there twice"),
    ("vllm#54230", file("model-1.safetensors", b"cut"), "no safetensors file"),
    ("bitsandbytes#1946", tensors(packed), "c_fc.weight .*integers"),
    ("nanoGPT#190", tensors(linear), "size mismatch for h.0.attn.c_attn.weight"),
    ("transformers#25732", tensors(more(WTE, 64, 16)), "size mismatch for wte.weight"),
    ("sglang#32028", config("n_head", num_attention_heads=2), "attention_heads 2"),
    ("transformers#43781", adapter_beside, "merge it first"),
], ids=lambda v: str(v)[:50])
def test_a_model_folder_loads_with_its_logits_or_is_refused_in_one_error(
        folder, report, change, message):
    change(folder)
    if message is None:
        assert torch.equal(GPT.from_pretrained(folder).eval()(IDS), random_model()(IDS))
        return
    with pytest.raises((ValueError, OSError), match=f"(?s){folder}.*{message}"):
        GPT.from_pretrained(folder)

same, ODD = dict, "is missing, extra, misshapen"

@pytest.mark.parametrize("report, change, settings, message", [  # None: it loads
    ("peft#1706", lambda t: {name: p.bfloat16() for name, p in t.items()}, {}, None),
    ("peft#2001", same, {"base_model_name_or_path": "/content/gone"}, None),
    ("lmdeploy#1284", same, {"loftq_config": {}, "lora_bias": False, "eva_config": None}, None),
    ("peft#2892", lambda t: {}, {}, "lora_A.default " + ODD),
    ("peft#2699", renamed(".weight", ".default.weight"), {}, "lora_.* " + ODD),
    ("torchtune#1399", renamed("transformer.", "_orig_mod."), {}, ODD),
    ("peft#2415, peft#2092", more("base_model.model.lm_head.weight", 64, 24), {},
     "lm_head.default " + ODD),
    ("peft#3585", same, {"trainable_token_indices": [1]}, "trainable_token"),
], ids=lambda v: str(v)[:50])
def test_an_adapter_loads_or_is_refused_and_changes_nothing(
        folder, report, change, settings, message):
    expected, model = adapted(), random_model()
    tensors(change, "adapter_model.safetensors")(Path("adapter"))
    change_json(Path("adapter/adapter_config.json"), **settings)
    if message is None:
        lora.load_lora(model, "adapter")
        torch.testing.assert_close(model(IDS), expected(IDS), rtol=0, atol=0.05)
        return
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=f"adapter: .*{message}"):
        lora.load_lora(model, "adapter")
    assert list(model.state_dict()) == before

@pytest.mark.parametrize("report, settings, expected", [
    ("unsloth#5386", {"eos_token_id": 7}, 7), ("mlx-vlm#309", {"eos_token_id": [7, 9]}, [7, 9]),
    ("mlx-lm#1414", None, 50256)])  # transformers' default
def test_a_merged_model_ends_as_its_base_and_transformers_loads_it(
        folder, report, settings, expected):
    config(*([] if settings else ["eos_token_id"]), **settings or {})(folder)
    adapted()
    flags = "--base model --adapter adapter --out out"
    assert lora.main(["merge", *flags.split()]) == 0
    assert read_json("out/config.json")["eos_token_id"] == expected
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    assert transformers.GPT2Config.from_pretrained("out").eos_token_id == expected

def merges(change):
    return lambda folder: (folder / "merges.txt").write_bytes(
        change((TINY / "merges.txt").read_bytes()))

def settings(**values):
    return lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps(values))

def added(index, content, special):
    token = {"content": content, "special": special, "lstrip": False, "rstrip": False}
    return settings(added_tokens_decoder={index: token})

@pytest.mark.parametrize("report, change, loads", [
    ("litellm#42208", merges(lambda text: text.replace(b"\n", b"\r\n")), True),
    ("llama.cpp#9696", merges(lambda text: text.split(b"\n", 1)[1]), True),
    ("llama.cpp#9696", merges(lambda text: text.rstrip(b"\n")), True),
    ("llama.cpp#9696", merges(lambda text: text + b"a b\n"), False),
    ("transformers#42481", settings(add_prefix_space=False), True),
    ("transformers#42481", settings(add_prefix_space=True), False),
    ("tokenizers#1422", added("2047", "<|endoftext|>", special=True), True),
    ("onnxruntime-extensions#890", added("2048", "<new>", special=False), False),
], ids=lambda v: str(v)[:50])
def test_a_tokenizer_gives_the_same_ids_or_is_refused(tmp_path, report, change, loads):
    text = "Hello  there, <new> world"
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(TINY / name, tmp_path)
    change(tmp_path)
    if loads:
        expected = data.load_tokenizer("tiny").encode_ordinary(text)
        assert data.load_tokenizer(tmp_path).encode_ordinary(text) == expected
    else:
        with pytest.raises(ValueError, match="not like GPT-2's"):
            data.load_tokenizer(tmp_path)

def test_ids_beyond_the_tokenizer_are_no_text(tmp_path, capsys):
    """huggingface/transformers#8472 and #24372, karpathy/build-nanogpt#81, Code-LMs#42."""
    folder = shutil.copytree(TINY, tmp_path / "padded")
    torch.manual_seed(0)  # rows that were added win, as in GPT-2 with new tokens
    pad = lambda wte: torch.cat([wte, 5 * torch.randn(64, wte.shape[1])])
    tensors(lambda t: t | {WTE: pad(t[WTE])})(folder)
    config(vocab_size=read_json(TINY / "config.json")["vocab_size"] + 64)(folder)
    flags = ["--model", str(folder), "--prompt", "The capital", "--max-new-tokens", "3"]
    assert gpt.main(flags) == 0 and capsys.readouterr().out.startswith("The capital")
