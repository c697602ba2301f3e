"""GPT-2 in plain PyTorch: the model, generation with a KV cache, and its checkpoint folder.

Names are GPT-2's own. Weights lie in nn.Linear layout [out, in]; Hugging Face files hold the four
matrices of a block as [in, out]. The head is the token embedding, unless the config says otherwise.
Checked against transformers, torch.nn.TransformerEncoderLayer and the safetensors library.

    python gpt.py --model tiny --prompt "The capital of France is"     # gpt2 is downloaded
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import re
import sys
import time
import urllib.request
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT-2; the defaults are those of the 124 M model."""
    vocab_size: int = 50257
    block_size: int = 1024  # longest sequence: positions are learned and absolute
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True


class KVCache:
    """Keys and values of the tokens so far, and the position (B, S) of each. Rows may end at other
    lengths (B,) than their neighbours: padding has a position that no token reaches."""

    def __init__(self, batch_size: int, max_length: int, device=None):
        self.max_length = max_length
        self.length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.positions = self.length.new_zeros(batch_size, 0)
        self.stored = {}  # attention module -> keys and values (2, B, H, max_length, D)

    def advance(self, T: int) -> Tensor:
        """Positions (B, T) of T more tokens; sets the mask (B, 1, T, S) of what they see."""
        new = self.length[:, None] + torch.arange(T, device=self.length.device)
        self.length = self.length + T
        self.positions = torch.cat((self.positions, new), dim=1)
        self.mask = (self.positions[:, None] <= new[..., None])[:, None]
        return new

    def append(self, layer: nn.Module, k: Tensor, v: Tensor) -> Tensor:
        """Store a layer's new k and v (B, H, T, D); returns all of them, (2, B, H, S, D)."""
        (B, H, T, D), S = k.shape, self.positions.shape[1]
        if layer not in self.stored:
            self.stored[layer] = k.new_empty(2, B, H, self.max_length, D)
        kv = self.stored[layer][:, :, :, :S]
        kv[0, :, :, S - T:], kv[1, :, :, S - T:] = k, v
        return kv

    def select(self, rows: list[int]) -> None:
        """Go on with these rows, in this order; the same row may come several times."""
        self.length, self.positions = self.length[rows], self.positions[rows]
        self.stored = {layer: kv[:, rows] for layer, kv in self.stored.items()}


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and what came before."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.append(self, k, v)  # (B, H, S, D), the earlier tokens too
        mask, dropout = cache and cache.mask, self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """Four times wider, GELU in its tanh form, and back."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then the MLP; each normalizes its input and adds to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. Calling it gives logits; `features` stops before the head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V, P, C = config.vocab_size, config.block_size, config.n_embd
        # nn.Embedding(V, C) draws weights, for which torch imports its compiler on the meta device.
        self.wte = nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(P, C), freeze=False)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2 and not p.is_meta:  # less where 2 n_layer of them add up
                terms = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(terms))

    def embed(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, C), what enters the first block."""
        T = idx.shape[1]
        positions = torch.arange(T, device=idx.device) if cache is None else cache.advance(T)
        return self.drop(self.wte(idx) + self.wpe(positions))

    def run_blocks(self, x: Tensor, first=0, last=None, cache: KVCache | None = None) -> Tensor:
        """Blocks first to last - 1 (None: to the end), (B, T, C) -> (B, T, C)."""
        for block in list(self.h)[first:last]:
            x = block(x, cache)
        return x

    def features(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, C) after ln_f; with a cache, idx continues what it holds."""
        return self.ln_f(self.run_blocks(self.embed(idx, cache), cache=cache))

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) int64 -> logits (B, T, V)."""
        return self.lm_head(self.features(idx))

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, dropout: float = 0.0,
                        tie_word_embeddings: bool | None = None) -> "GPT":
        """The model of a Hugging Face GPT-2 folder, in float32; tie_word_embeddings=False gives the
        head a copy of the embedding. ValueError for a tensor that is missing, unexpected, misshapen
        or not finite, and for the config of another model; OSError for a file that is not there."""
        folder = model_folder(name_or_folder)
        config, tensors = read_config(folder), read_weights(folder)
        wte, head = tensors.get("wte.weight"), tensors.get("lm_head.weight")
        tied = config.tie_word_embeddings and (wte is None or head is None or wte.equal(head))
        if tied:  # the file may hold it under either name
            tensors["wte.weight"] = tensors["lm_head.weight"] = head if wte is None else wte
        elif tie_word_embeddings:
            raise ValueError(f"{folder}: its head differs from the embedding and cannot be tied")
        if tied and tie_word_embeddings is False:
            tied, tensors["lm_head.weight"] = False, tensors["wte.weight"].clone()
        with torch.device("meta"):  # no time is spent on weights that will be replaced
            model = cls(replace(config, dropout=dropout, tie_word_embeddings=tied))
        try:
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{folder}: {' '.join(str(error).split())[:500]}") from None
        if tied:
            model.lm_head.weight = model.wte.weight
        return model

    def save_pretrained(self, folder: str | Path, base_only=False, eos_id: int | None = None):
        """Write config.json and model.safetensors as Hugging Face has them; the usual eos_id is the
        last. ValueError for adapters that were not merged, unless base_only leaves them out."""
        folder, tensors, config = Path(folder), {}, self.config
        for name, p in self.named_parameters():
            if not re.search(r"\blora_", name):
                key = name if name == "lm_head.weight" else f"transformer.{name}"
                tensors[key] = p.t() if name.endswith(CONV1D) else p
            elif not base_only:
                raise ValueError(f"{name} belongs to an adapter: merge it first")
        write_safetensors(folder / "model.safetensors", tensors)
        eos_id = config.vocab_size - 1 if eos_id is None else eos_id
        write_json(folder / "config.json", {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
            "bos_token_id": eos_id, "eos_token_id": eos_id,
            **{key: getattr(config, field) for key, field in CONFIG_KEYS.items()},
            **dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], config.dropout)})


def sample(logits: Tensor, temperature=0.0, top_k=None, top_p=None, u=None) -> Tensor:
    """Next ids (B,) from logits (B, V): the largest at temperature 0, else drawn by uniform numbers
    u (B,) from the top_k largest and of these the fewest that reach top_p (arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    V = logits.shape[-1]
    values, ids = logits.float().topk(min(top_k or V, V))  # (B, k) descending; k also among equals
    probs = F.softmax((values - values[:, :1]) / temperature, dim=-1)
    if top_p is not None:
        probs[probs.cumsum(-1) - probs >= top_p] = 0.0  # those before it reach top_p
    mass = probs.cumsum(-1)
    drawn = torch.searchsorted(mass, u[:, None] * mass[:, -1:])
    return ids.gather(1, drawn)[:, 0]


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, *,
             eos_id: int | None = None, temperature: float = 0.0, top_k: int | None = None,
             top_p: float | None = None, seed: int | None = None) -> list[list[int]]:
    """Continue prompts of different lengths in one batch; returns the new ids, without eos. A row
    leaves the batch at eos_id, after max_new_tokens, or where block_size is full. ValueError for an
    empty prompt, one that leaves no room for an id, and options that are impossible or idle."""
    if not prompts:
        return []
    block_size, device = model.config.block_size, model.wte.weight.device
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < block_size:
            raise ValueError(f"prompt {i} has {len(prompt)} ids, needed are 1 to {block_size - 1}")
    if (max_new_tokens < 1 or not temperature >= 0 or temperature == 0 and (top_k or top_p)
            or top_k is not None and top_k < 1 or top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"impossible or idle: {max_new_tokens=} {temperature=} {top_k=} {top_p=}")
    rng = None if seed is None else torch.Generator(device).manual_seed(seed)
    room = [min(max_new_tokens, block_size - len(p)) for p in prompts]
    modes = {module: module.training for module in model.modules()}
    adapters = {m: m.active for m in modes if isinstance(getattr(m, "active", None), list)}
    model.eval()

    # What all prompts begin with is computed once, unless each row has an adapter of its own.
    shared = [] if adapters else os.path.commonprefix([p[:-1] for p in prompts])
    cache = KVCache(1, max(map(len, prompts)) + max(room), device)
    if shared:
        model.features(torch.tensor([shared], device=device), cache)
    cache.select([0] * len(prompts))
    rest = [torch.tensor(p[len(shared):], device=device) for p in prompts]
    hidden = model.features(nn.utils.rnn.pad_sequence(rest, batch_first=True), cache)  # (B, T, C)
    cache.length = torch.tensor([len(p) for p in prompts], device=device)
    cache.positions[cache.positions >= cache.length[:, None]] = block_size  # padding: never seen

    rows, answers = list(range(len(prompts))), [[] for _ in prompts]  # rows: still in the batch
    hidden = hidden[rows, [len(ids) - 1 for ids in rest]]  # (B, C)
    while rows:
        # Drawn for all prompts: which rows are left changes nothing for the others.
        u = torch.rand(len(prompts), generator=rng, device=device)[rows] if temperature else None
        ids = sample(model.lm_head(hidden), temperature, top_k, top_p, u)  # (B,)
        for row, token in zip(rows, ids.tolist()):
            answers[row].append(token)
        going = [place for place, row in enumerate(rows)
                 if answers[row][-1] != eos_id and len(answers[row]) < room[row]]
        if len(going) < len(rows):
            cache.select(going)
            for module in adapters:
                module.active = [module.active[place] for place in going]
        rows = [rows[place] for place in going]
        if rows:
            hidden = model.features(ids[going, None], cache)[:, -1]
    for module, training in modes.items():
        module.training = training
    for module, active in adapters.items():
        module.active = active
    return [answer[:-1] if answer[-1] == eos_id else answer for answer in answers]


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Name -> tensor, on the CPU. ValueError unless the tensors fill the file exactly."""
    size, tensors = os.path.getsize(path), {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, size))
    try:
        content = torch.from_file(str(path), size=size, dtype=torch.uint8)  # mapped, not read
        header, start = json.loads(text), 8 + length
        header.pop("__metadata__", None)
        end = start
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [begin - start, end - start]:
                raise ValueError(f"{name} is not at {begin}:{end}")
            tensors[name] = content[begin:end].clone().view(dtype).reshape(shape)
        if end != size:
            raise ValueError(f"{size} bytes instead of {end}")
    except Exception as error:  # whatever a damaged header leads to
        raise ValueError(f"{path}: not a whole safetensors file (git lfs pull?): {error}") from None
    return tensors


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors of any layout and device, whole or not at all."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        begin, end = end, end + t.nbytes
        header[name] = dict(dtype=codes[t.dtype], shape=list(t.shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():  # one at a time: no second copy of the model
            t = t.detach().cpu().contiguous()
            file.write((ctypes.c_char * t.nbytes).from_address(t.data_ptr()))


@contextmanager
def replacing(path: str | Path):
    """A file to write to, which takes the place of `path` when all is written, or vanishes."""
    temp = Path(f"{path}.{os.getpid()}.tmp")
    temp.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def read_json(path: str | Path) -> dict:
    """Read JSON; ValueError or OSError name the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def write_json(path: str | Path, value: dict) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


PUBLISHED = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large",
             "gpt2-xl")} | {"distilgpt2": "distilbert/distilgpt2"}
FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")
CONFIG_KEYS = {"n_positions": "block_size"} | {key: key for key in (  # config.json -> GPTConfig
    "vocab_size", "n_layer", "n_head", "n_embd", "layer_norm_epsilon", "tie_word_embeddings")}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as [in, out]
OTHERS = {"adapter*": "an adapter, merge it first: lora.py merge --base M --adapter THIS --out NEW",
          "*.bin": "a pickle, convert it: save_pretrained of transformers",
          "hparams.json": "OpenAI's TensorFlow files, take a published name: gpt2"}


def model_folder(name_or_folder: str | Path) -> Path:
    """The model folder that a name, a folder or a run without adapter means; a published model is
    downloaded once. FileNotFoundError or ValueError say what else is there."""
    folder = Path(name_or_folder)
    if name_or_folder == "tiny":
        return Path(__file__).resolve().parent / "tiny" / "model"
    if name_or_folder in PUBLISHED:
        cache = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        folder = cache / "gpt2-finetune" / name_or_folder
        hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        url = f"{hub.rstrip('/')}/{PUBLISHED[name_or_folder]}/resolve/main"
        for file in FILES:
            if not (folder / file).is_file():
                download(f"{url}/{file}", folder / file)
        return folder
    if (folder / "model").is_dir() and not (folder / "adapter").is_dir():  # a run
        folder = folder / "model"
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        return folder
    for pattern, what in OTHERS.items():
        if any(folder.glob(pattern)):
            raise ValueError(f"{folder}: no model, but {what}")
    raise FileNotFoundError(f"{folder}: no config.json with model.safetensors there, and no name "
                            f"(tiny, {', '.join(PUBLISHED)})")


def locate(name_or_folder: str | Path) -> tuple[Path, Path | None]:
    """Model folder and adapter folder (None without one) that a name, a folder or a run means."""
    run = Path(name_or_folder)
    if not (run / "adapter").is_dir():
        return model_folder(name_or_folder), None
    if (run / "model").is_dir():
        return run / "model", run / "adapter"
    return model_folder(read_json(run / "run.json")["flags"]["model"]), run / "adapter"


def read_config(folder: Path) -> GPTConfig:
    """GPTConfig from config.json; ValueError for a setting that would change the logits."""
    raw = read_json(folder / "config.json")
    config = GPTConfig(**{CONFIG_KEYS[key]: raw[key] for key in CONFIG_KEYS if key in raw})
    supported = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
                 "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
                 "add_cross_attention": [False], "n_inner": [None, 4 * config.n_embd]}
    for key, values in supported.items():
        if raw.get(key, values[0]) not in values:
            raise ValueError(f"{folder}: {key} {raw[key]!r} is not supported, only {values[0]!r}")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Our name -> float32 tensor in nn.Linear layout, from one file or an index's shards."""
    files, tensors = ["model.safetensors"], {}
    if not (folder / files[0]).is_file():
        files = set(read_json(folder / "model.safetensors.index.json")["weight_map"].values())
    for path in (folder / file for file in files):
        part = read_safetensors(path)
        while part:  # one by one: no second copy of the model
            name, t = part.popitem()
            name = name.removeprefix("transformer.")
            if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name):
                continue  # the causal mask, which old files carry
            if name in tensors or not t.is_floating_point() or not t.float().isfinite().all():
                raise ValueError(f"{path}: {name} is there twice, or holds NaN, inf or integers")
            tensors[name] = (t.t().contiguous() if name.endswith(CONV1D) else t).float()
    return tensors


class Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the headers of the hub's redirect to its CDN: they state the file's size and sha256."""
    said = {}

    def redirect_request(self, request, file, code, message, headers, url):
        self.said = headers
        return super().redirect_request(request, file, code, message, headers, url)


def download(url: str, path: Path, sha256: str | None = None, attempts: int = 3) -> None:
    """Fetch a file, whole or not at all; checked are its size, and its sha256, given or the hub's.
    OSError where network, server or disk fail each time, ValueError where something else comes."""
    redirects, digest = Redirects(), hashlib.sha256()
    fetch = urllib.request.build_opener(redirects).open
    try:
        with fetch(url, timeout=30) as answer, replacing(path) as file:
            said = redirects.said
            size = int(said.get("X-Linked-Size") or answer.headers.get("Content-Length") or 0)
            while chunk := answer.read(2**24):
                if not file.tell() and chunk.lstrip()[:5].lower() in (b"<!doc", b"<html"):
                    raise ValueError(f"{url}: a web page came in place of the file")
                file.write(chunk)
                digest.update(chunk)
                if size > 2**24:
                    print(f"{path.name}: {file.tell() >> 20} of {size >> 20} MiB", file=sys.stderr)
            if file.tell() != size:
                raise OSError(f"{file.tell()} bytes came instead of {size}")
            tag = re.search(r"\b[0-9a-f]{64}\b", said.get("X-Linked-Etag", ""))
            if digest.hexdigest() != (sha256 or tag and tag[0] or digest.hexdigest()):
                raise ValueError(f"{url}: what came has another sha256, {digest.hexdigest()}")
    except OSError as error:
        if attempts == 1 or 400 <= getattr(error, "code", 0) < 500:
            raise OSError(f"{url}: {error}; or put it into {path.parent} yourself") from None
        time.sleep(1)
        download(url, path, sha256, attempts - 1)


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda (torchrun's processes: each its own), cuda:1, mps; ValueError if not here."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: not here (auto, cpu, cuda, cuda:1, mps)") from None


def main(argv=None) -> int:
    """Print a prompt and its continuation; returns the exit code."""
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    parser.add_argument("--model", default="tiny", help="a model folder, a run folder, or a name")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=50, help="stop after so many")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest that reach p")
    parser.add_argument("--seed", type=int, default=123, help="of the draws")
    options = vars(parser.parse_args(argv))
    try:
        from data import load_tokenizer
        from lora import load_lora
        folder, adapter = locate(options.pop("model"))
        model, tokenizer = GPT.from_pretrained(folder), load_tokenizer(folder)
        if adapter:
            load_lora(model, adapter)
        ids = tokenizer.encode_ordinary(options.pop("prompt"))
        ids += generate(model, [ids], eos_id=tokenizer.eot_token, **options)[0]
        print(tokenizer.decode([i for i in ids if i < tokenizer.n_vocab]))  # the head may be wider
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
