"""GPT-2 in plain PyTorch: the model, generation with a KV cache, and its checkpoint folder.

Shapes: B rows, T tokens (S with those before), C channels, H heads of D, V ids; weights [out, in].

    python gpt.py --model tiny --prompt "The capital of France is"
"""

import argparse
import ctypes
import hashlib
import json
import os
import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib import request

warnings.filterwarnings("ignore", "Failed.*NumPy")
import torch
import torch.nn.functional as F
from torch import nn

@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT-2; by default the 124 M model's."""
    vocab_size: int = 50257
    block_size: int = 1024  # positions are learned
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True  # the head is the token embedding

class CausalSelfAttention(nn.Module):
    """Multi-head attention: a token sees itself and those before."""
    def __init__(self, config):
        super().__init__()
        C, self.n_head, self.dropout = config.n_embd, config.n_head, config.dropout
        self.c_attn = nn.Linear(C, 3 * C)  # query, key, value in one
        self.c_proj = nn.Linear(C, C)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        k, v, mask = cache.append(self, k, v) if cache else (k, v, None)  # (B, H, S, D) twice
        dropout = self.dropout * self.training
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

class MLP(nn.Module):
    """Four times wider, GELU in its tanh form, and back."""
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.c_fc = nn.Linear(C, 4 * C)
        self.c_proj = nn.Linear(4 * C, C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))

class Block(nn.Module):
    """Attention, then the MLP, each on its normalized input."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    """Calling it gives logits; `features` stops before the head."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.n_embd
        # nn.Embedding draws weights; on "meta" that imports the compiler
        self.wte = nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.block_size, C), freeze=False)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C, config.layer_norm_epsilon)
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2 and not p.is_meta:  # less where 2 n_layer of them add up
                terms = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / terms**0.5)

    def embed(self, idx, cache=None):  # (B, T) int64 -> (B, T, C)
        T = idx.shape[1]
        positions = cache.advance(T) if cache else torch.arange(T, device=idx.device)
        return self.drop(self.wte(idx) + self.wpe(positions))

    def run_blocks(self, x, first=0, last=None, cache=None):  # to last - 1
        for block in list(self.h)[first:last]:
            x = block(x, cache)
        return x

    def features(self, idx, cache=None):  # (B, T) int64 -> (B, T, C)
        return self.ln_f(self.run_blocks(self.embed(idx, cache), cache=cache))

    def forward(self, idx):  # (B, T) int64 -> logits (B, T, V)
        return self.lm_head(self.features(idx))

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0, tie_word_embeddings=None):
        """Load a Hugging Face folder, strictly, in float32; tie_word_embeddings=False unties it."""
        folder = model_folder(name_or_folder)
        config, tensors = read_config(folder), read_weights(folder)
        wte, head = tensors.get("wte.weight"), tensors.get("lm_head.weight")
        tied = config.tie_word_embeddings and (wte is None or head is None or wte.equal(head))
        if tied:  # under either name
            tensors["wte.weight"] = tensors["lm_head.weight"] = head if wte is None else wte
        if tied and tie_word_embeddings is False:
            tied, tensors["lm_head.weight"] = False, tensors["wte.weight"].clone()
        with torch.device("meta"):  # weights come from the file
            model = cls(replace(config, dropout=dropout, tie_word_embeddings=tied))
        try:
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{folder}: {str(error)[:500]}") from None
        if tied:
            model.lm_head.weight = model.wte.weight
        return model

    def save_pretrained(self, folder, base_only=False, eos_id=None):
        """Write such a folder. Unmerged adapters are an error, unless base_only."""
        tensors, config = {}, self.config
        for name, p in self.named_parameters():
            if not re.search(r"\blora_", name):
                key = name if name == "lm_head.weight" else f"transformer.{name}"
                tensors[key] = p.t() if name.endswith(CONV1D) else p
            elif not base_only:
                raise ValueError(f"{name} belongs to an adapter: merge it first")
        write_safetensors(Path(folder, "model.safetensors"), tensors)
        eos_id = config.vocab_size - 1 if eos_id is None else eos_id
        write_json(Path(folder, "config.json"), {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "eos_token_id": eos_id,
            "n_positions": config.block_size, **vars(config)})

class KVCache:
    """Keys, values and positions (B, S) of the tokens so far; rows may differ in length."""
    def __init__(self, batch_size, max_length, device=None):
        self.max_length = max_length
        self.length = torch.zeros(batch_size, dtype=int, device=device)
        self.positions = self.length.new_zeros(batch_size, 0)
        self.stored = {}  # layer -> (2, B, H, max_length, D)

    def advance(self, T):
        """Positions (B, T) of T more tokens; sets the mask (B, 1, T, S) of what they see."""
        new = self.length[:, None] + torch.arange(T, device=self.length.device)
        self.length = self.length + T
        self.positions = torch.cat((self.positions, new), dim=1)
        self.mask = (self.positions[:, None] <= new[..., None])[:, None]
        return new

    def append(self, layer, k, v):
        """Store new keys and values (B, H, T, D); returns all (B, H, S, D), and the mask."""
        (B, H, T, D), S = k.shape, self.positions.shape[1]
        if layer not in self.stored:
            self.stored[layer] = k.new_empty(2, B, H, self.max_length, D)
        keys, values = self.stored[layer][:, :, :, :S]
        keys[:, :, -T:], values[:, :, -T:] = k, v
        return keys, values, self.mask

    def select(self, rows):
        """Keep these rows; one may come several times."""
        self.length, self.positions = self.length[rows], self.positions[rows]
        self.stored = {layer: kv[:, rows] for layer, kv in self.stored.items()}

def sample(logits, temperature=0.0, top_k=None, top_p=None, rng=None):
    """(B, V) -> ids (B,): the likeliest, or drawn from top_k, cut at top_p (arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    values, ids = logits.float().topk(min(top_k or 10**9, logits.shape[-1]))  # (B, k), descending
    probs = F.softmax((values - values[:, :1]) / temperature, dim=-1)
    probs[probs.cumsum(-1) - probs >= (top_p or 2)] = 0.0  # those before it reach top_p
    return ids.gather(1, torch.multinomial(probs, 1, generator=rng))[:, 0]

@torch.inference_mode()
def generate(model, prompts, max_new_tokens, *, eos_id=None, temperature=0.0, top_k=None,
             top_p=None, seed=None):
    """Continue prompts, lists of ids, in one batch; returns lists of the new ids, without eos. A
    row ends at eos_id, after max_new_tokens, or where block_size is full."""
    if not prompts:
        return []
    block_size, device = model.config.block_size, model.wte.weight.device
    room = [min(max_new_tokens, block_size - len(p)) for p in prompts]
    if not all(prompts) or min(room) < 1:
        raise ValueError(f"prompts of 1 to {block_size - 1} ids are needed; {max_new_tokens=}")
    possible = (top_k or 1) > 0 and (top_p is None or 0 < top_p <= 1)
    if not (temperature > 0 and possible or temperature == 0 and top_k is top_p is None):
        raise ValueError(f"impossible together: {temperature=} {top_k=} {top_p=}")
    rng = None if seed is None else torch.Generator(device).manual_seed(seed)
    rows, answers = list(range(len(prompts))), [[] for _ in prompts]  # rows: still in the batch
    before = {m: dict(vars(m)) for m in model.modules()}  # modes, adapters of rows
    per_row = [m for m in before if isinstance(getattr(m, "active", None), list)]
    shared = [] if per_row else os.path.commonprefix([p[:-1] for p in prompts])
    try:
        model.eval()
        length = torch.tensor([len(p) for p in prompts], device=device)
        cache = KVCache(1, int(length.max()) + max(room), device)
        if shared:  # once, what all begin with
            model.features(length.new_tensor([shared]), cache)
        cache.select([0] * len(prompts))
        rest = [length.new_tensor(p[len(shared):]) for p in prompts]
        x = model.features(nn.utils.rnn.pad_sequence(rest, batch_first=True), cache)  # (B, T, C)
        x = x[rows, length - len(shared) - 1]  # (B, C) of each last id
        cache.length = length
        cache.positions[cache.positions >= length[:, None]] = block_size  # padding
        while rows:  # each gets an id; the ended leave
            ids = sample(model.lm_head(x), temperature, top_k, top_p, rng)  # (B,)
            for row, token in zip(rows, ids.tolist()):
                answers[row].append(token)
            going = [i for i, row in enumerate(rows)
                     if answers[row][-1] != eos_id and len(answers[row]) < room[row]]
            if len(going) < len(rows):
                cache.select(going)
                rows = [rows[i] for i in going]
                for m in per_row:
                    m.active = [m.active[i] for i in going]
            if rows:
                x = model.features(ids[going, None], cache)[:, -1]
    finally:
        for m, state in before.items():
            vars(m).update(state)
    return [ids[:-1] if ids[-1] == eos_id else ids for ids in answers]

PUBLISHED = dict.fromkeys(["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"], "openai-community")
PUBLISHED["distilgpt2"] = "distilbert"
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as [in, out]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}
HINTS = {"adapter*": "; an adapter: merge it first (lora.py merge)",
         "*.bin": "; a pickle: save it again by transformers",
         "hparams.json": "; OpenAI's TensorFlow files: take gpt2"}

def model_folder(name):
    """The model folder of a name (downloaded once), a folder, or a run without adapter."""
    folder = Path(name)
    if name == "tiny":
        return Path(__file__).resolve().parent / "tiny/model"
    if name in PUBLISHED:
        home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
        folder = Path(home, "gpt2-finetune", name).expanduser()
        hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        for file in ("config.json", "vocab.json", "merges.txt", "model.safetensors"):
            if not (folder / file).is_file():
                download(f"{hub}/{PUBLISHED[name]}/{name}/resolve/main/{file}", folder / file)
        return folder
    if (folder / "model").is_dir() and not (folder / "adapter").is_dir():  # a run
        folder /= "model"
    has = lambda pattern: any(folder.glob(pattern))
    if has("config.json") and has("model*.safetensors") and not has("adapter*"):
        return folder
    hints = [hint for pattern, hint in HINTS.items() if has(pattern)]
    raise FileNotFoundError(f"{folder}: no model, nor tiny, {', '.join(PUBLISHED)}{''.join(hints)}")

def locate(name):
    """Model folder and adapter folder (or None) of a name, a folder or a run."""
    run, model = Path(name), Path(name, "model")
    if not (run / "adapter").is_dir():
        return model_folder(name), None
    base = model if model.is_dir() else read_json(run / "run.json")["flags"]["model"]
    return locate(base)[0], run / "adapter"

def load_model(name, device="cpu", dropout=0.0, untie=False):
    """(model with its adapter, in eval mode; tokenizer) of a name, a folder or a run."""
    from data import load_tokenizer
    from lora import load_lora
    folder, adapter = locate(name)
    model = GPT.from_pretrained(folder, dropout, False if untie else None)
    if adapter:
        load_lora(model, adapter)
    tokenizer, V = load_tokenizer(folder), model.config.vocab_size
    if tokenizer.n_vocab > V:
        raise ValueError(f"{folder}: its tokenizer has {tokenizer.n_vocab} ids, the model {V}")
    return model.to(device).eval(), tokenizer

def read_config(folder):
    """ValueError for settings that would change the logits."""
    raw = read_json(folder / "config.json")
    raw["block_size"] = raw.get("n_positions", 1024)
    supported = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
                 "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
                 "num_attention_heads": [None]}
    for key, values in supported.items():
        if raw.get(key, values[0]) not in values:
            raise ValueError(f"{folder}: {key} {raw[key]!r} is not {values[0]!r}")
    return GPTConfig(**{key: raw[key] for key in vars(GPTConfig()) if key in raw})

def read_weights(folder):
    """Our name -> float32 tensor, [out, in], from all shards."""
    tensors = {}
    for path in folder.glob("model*.safetensors"):
        part = read_safetensors(path)
        while part:
            name, t = part.popitem()
            name = name.removeprefix("transformer.")
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # the causal mask of old files
            if name in tensors or not t.is_floating_point() or not t.float().isfinite().all():
                raise ValueError(f"{path}: {name} is there twice, or has NaN, inf or integers")
            tensors[name] = (t.t().contiguous() if name.endswith(CONV1D) else t).float()
    return tensors

def read_safetensors(path):
    """Name -> tensor, on the CPU. ValueError for another kind of file."""
    tensors = {}
    try:
        with open(path, "rb") as file:  # not mapped: pages count as memory
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                t = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
                memory = (ctypes.c_char * t.nbytes).from_address(t.data_ptr())
                file.seek(8 + length + begin)
                if file.readinto(memory) != end - begin:
                    raise ValueError(f"{name} is cut")
                tensors[name] = t
    except Exception as error:
        raise ValueError(f"{path}: no safetensors file (git lfs pull?): {error}") from None
    return tensors

def write_safetensors(path, tensors):
    """Write named tensors of any layout and device, whole or not at all."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        begin, end = end, end + t.nbytes
        header[name] = dict(dtype=codes[t.dtype], shape=list(t.shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            t = t.detach().cpu().contiguous()
            file.write((ctypes.c_char * t.nbytes).from_address(t.data_ptr()))

@contextmanager
def replacing(path):
    """A file that replaces `path` when all is written, or vanishes."""
    temp = Path(f"{path}.{os.getpid()}.tmp")
    temp.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temp, "w+b") as file:
            yield file
        os.replace(temp, path)
    except RuntimeError as error:  # of a full disk
        raise OSError(f"{path}: {error.__context__ or error}") from None
    finally:
        temp.unlink(missing_ok=True)

def read_json(path):
    """ValueError names the file."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None

def write_json(path, value):
    """Whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")

class Redirects(request.HTTPRedirectHandler):
    """Keeps the hub's headers."""
    said = {}
    def redirect_request(self, *args):
        self.said = args[4]
        return super().redirect_request(*args)

def download(url, path):
    """Fetch a file whole or not at all; OSError unless size and sha256 are as stated."""
    hub, sha256 = Redirects(), hashlib.sha256()
    try:
        with request.build_opener(hub).open(url, timeout=30) as reply, replacing(path) as file:
            while chunk := reply.read(2**24):
                file.write(chunk)
                sha256.update(chunk)
            size = hub.said.get("X-Linked-Size") or reply.headers["Content-Length"]
            tag = re.search(r"\b[0-9a-f]{64}\b", hub.said.get("X-Linked-Etag", ""))
            page = reply.headers.get_content_type() == "text/html"
            if page or str(file.tell()) != size or tag and tag[0] != sha256.hexdigest():
                raise OSError("what came is not the file")
    except Exception as error:
        raise OSError(f"{url}: {error}; or put it into {path.parent} yourself") from None

def choose_device(name):
    """cuda under torchrun: each process its own. ValueError if it is not here."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every length
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: not here; try auto, cpu, cuda:1, mps") from None

def choose_attention(length):
    """Where oneDNN multiplies, up to 1.75 times as fast without flash on short texts."""
    onednn = torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    torch.backends.cuda.enable_flash_sdp(length > 256 or not onednn)

def keep_freed_memory():
    """glibc would give it back after each step."""
    if mallopt := getattr(ctypes.pythonapi, "mallopt", None):
        mallopt(-3, 1 << 30) or mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD; old glibc: 32 MiB
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: none

def use_onednn():
    """Asked for bf16, torch takes oneDNN: on AMD 2 x MKL, with memory for each text length. Undone
    where it rounds (AMX, Arm)."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "24")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
    matmul = torch.backends.mkldnn.matmul
    matmul.fp32_precision = "bf16"
    x = torch.full((256, 256), 1 + 2**-12)  # 1 in bf16
    products = x @ x, x.t() @ x, x[:8] @ x.t(), torch.bmm(x[None], x[None])
    if not all(torch.allclose(y / 256, x[0, 0].square(), rtol=1e-6, atol=0) for y in products):
        matmul.fp32_precision = "none"

def main(argv=None):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    flag = parser.add_argument
    flag("--model", default="tiny", help="folder, run or name (tiny)")
    flag("--prompt", required=True, help="text to continue")
    flag("--max-new-tokens", type=int, default=50, help="at most (50)")
    flag("--temperature", type=float, default=0.0, help="0: the likeliest")
    flag("--top-k", type=int, help="draw from the k likeliest")
    flag("--top-p", type=float, help="draw from the fewest that reach p")
    flag("--seed", type=int, default=123, help="of the draws (123)")
    options = vars(parser.parse_args(argv))
    try:
        model, tokenizer = load_model(options.pop("model"))
        ids = tokenizer.encode_ordinary(options.pop("prompt"))
        ids += generate(model, [ids], eos_id=tokenizer.eot_token, **options)[0]
        print(tokenizer.decode([i for i in ids if i < tokenizer.n_vocab]))
        return 0
    except (OSError, ValueError, ImportError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 1

if __name__ == "__main__":
    sys.exit(main())
