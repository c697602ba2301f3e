# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0"]
# ///
"""
GPT-2 in plain PyTorch: the model, its checkpoint folder, and generation with a KV cache.

Module and parameter names are GPT-2's own (wte, h.0.attn.c_attn, ...), so a published checkpoint loads
by name. Linear weights lie in nn.Linear layout [out, in]; Hugging Face files hold the four matrices of a
block as [in, out], which `from_pretrained` and `save_pretrained` transpose. The output head is the token
embedding (tied), unless the config says otherwise.

Checked in tests/test_gpt.py against transformers' GPT2LMHeadModel, torch.nn.TransformerEncoderLayer,
the safetensors library, and (cached against uncached logits) against itself.

    python gpt.py --model tiny --prompt "The capital of France is"
    python gpt.py --model gpt2 --prompt "The capital of France is"     # the first time, this downloads
"""

import argparse
import ctypes
import hashlib
import http.client
import json
import math
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so without numpy, which is not needed
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT-2; the defaults are those of the 124 M model."""

    vocab_size: int = 50257
    block_size: int = 1024  # longest sequence, in tokens: positions are learned and absolute
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**24:
                raise ValueError(f"{name} must be a positive integer below 2**24, not {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout!r}")
        if type(self.layer_norm_epsilon) not in (int, float) or not 0 <= self.layer_norm_epsilon < math.inf:
            raise ValueError(f"layer_norm_epsilon must be a number, zero or above, not {self.layer_norm_epsilon!r}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings must be true or false, not {self.tie_word_embeddings!r}")


CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # which Hugging Face stores transposed, as [in, out]


# ---------------------------------------------------------------------------------------------
# the model


class KVCache:
    """
    Keys and values of the tokens seen so far, one (B, H, max_length, D) pair per layer. Rows may be of
    different lengths: `length` (B,) counts each row's tokens, and a new token of row b is written at
    position length[b]. What lies beyond a row's length is never attended to.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_length: int, device=None, dtype=None):
        shape = (batch_size, config.n_head, max_length, config.n_embd // config.n_head)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.max_length = max_length

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, end: int):
        """Store k, v (B, H, T, D) at positions (B, T); return all keys and values up to `end`."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]  # (B, 1)
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            stored[:, :, end - k.shape[2]:end] = 0  # shorter rows have nothing there, and a masked NaN is still a NaN
            stored[rows, :, positions] = new.transpose(1, 2).to(stored.dtype)
        return self.keys[layer][:, :, :end].to(k.dtype), self.values[layer][:, :, :end].to(v.dtype)

    def start(self, other: "KVCache") -> None:
        """Let every row of this empty cache begin with the one row of another."""
        n = int(other.length)
        for stored, given in zip(self.keys + self.values, other.keys + other.values):
            stored[:, :, :n] = given[:, :, :n]
        self.length.fill_(n)

    def keep(self, rows: list[int]) -> list[int]:
        """Forget all rows but these (ascending): the last of them fill the gaps. Returns their new order."""
        n, end = len(rows), int(self.length.max())
        gaps = sorted(set(range(n)) - set(rows))
        moved = rows[n - len(gaps):]
        for tensors in (self.keys, self.values):
            for layer, stored in enumerate(tensors):
                stored[gaps, :, :end] = stored[moved, :, :end]
                tensors[layer] = stored[:n]
        moves = dict(zip(gaps, moved))
        order = [moves.get(i, i) for i in range(n)]
        self.length = self.length[order]
        return order


FEW_SCORES = 200 * 200  # per head: up to here, on the CPU, holding them all is faster than flash attention's small products


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, all scores held in memory: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). `mask`
    (B, 1, T, S) is true where a query sees a key; without one a query sees the keys up to its own position."""
    (B, H, T, D), S = q.shape, k.shape[2]
    if mask is None:
        bias = torch.full((T, S), -math.inf, dtype=q.dtype).triu(1)
    else:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf).expand(B, H, T, S).flatten(0, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=D**-0.5)  # (B H, T, S)
    return torch.bmm(F.dropout(scores.softmax(-1), dropout), v.flatten(0, 1)).unflatten(0, (B, H))


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and what came before."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, store=None, wanted: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        on_cpu = x.device.type == "cpu"
        q, k, v = qkv.contiguous() if on_cpu else qkv  # (B, H, T, D) each
        if store is not None:
            k, v = store(k, v)  # (B, H, S, D): the S - T earlier tokens too
        dropout = self.dropout if self.training else 0.0
        if on_cpu and q.dtype == torch.float32 and T * k.shape[2] <= FEW_SCORES:  # in bf16 these would be rounded
            y = attention(q, k, v, mask, dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y if wanted is None else y.flatten(0, 1)[wanted]))  # (B, T, C) or (N, C)


class MLP(nn.Module):
    """Four times wider, GELU in its tanh form, and back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then the MLP; each normalizes its input and adds to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, store=None, wanted: Tensor | None = None) -> Tensor:
        y = self.attn(self.ln_1(x), mask, store, wanted)
        x = y + (x if wanted is None else x.flatten(0, 1)[wanted])  # (B, T, C), or the N wanted positions (N, C)
        return x + self.mlp(self.ln_2(x))


def run_block(block: Block, x: Tensor, wanted: Tensor | None) -> Tensor:
    """Run one block without a cache; replaced as a whole by --compile and --recompute."""
    return block(x, wanted=wanted)


def embedding(rows: int, width: int) -> nn.Embedding:
    """nn.Embedding; on the meta device without drawing its weights, for which torch would import its compiler (a second)."""
    weight = torch.empty(rows, width)
    return nn.Embedding(rows, width, _weight=weight if weight.is_meta else None)


class GPT(nn.Module):
    """GPT-2. Calling it gives logits (B, T, V); `features` stops before the head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.run_block = run_block  # can be replaced, by its compiled form or one that recomputes activations
        self.wte = embedding(config.vocab_size, config.n_embd)
        self.wpe = embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        # As GPT-2: normal(0, 0.02), and the layers that write to the residual stream scaled down by
        # the square root of how many of them there are, so that its variance does not grow with depth.
        for name, p in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2 and not p.is_meta:  # on the meta device torch would import its compiler to draw them
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(p, std=std)

    def features(self, idx: Tensor, cache: KVCache | None = None, wanted: Tensor | None = None,
                 hidden: Tensor | None = None, first: int = 0) -> Tensor:
        """
        Hidden states after the last LayerNorm: (B, T) int64 -> (B, T, C). The head can then be applied
        only where logits are wanted: `model.lm_head(hidden[rows, columns])`.
        With a cache, idx continues each row at position cache.length[row], and the cache is extended.
        `wanted` (N,) are indices into the B * T positions: only these come back, (N, C), and only for these
        does the last block compute more than attention. `hidden` (B, T, C) is what enters block `first`, if it
        is known already (see `hidden_states`). Neither can be combined with per-row adapters.
        Raises ValueError where a position would lie beyond block_size (or the cache's max_length).
        """
        B, T = idx.shape
        positions = torch.arange(T, device=idx.device)  # (T,)
        limit, end, mask = self.config.block_size, T, None
        if cache is not None:
            limit = min(limit, cache.max_length)
            positions = cache.length[:, None] + positions  # (B, T)
            end = int(positions.max()) + 1
            if end > T:  # some row has a past: query t of row b sees the keys up to its own position
                mask = (torch.arange(end, device=idx.device) <= positions[..., None])[:, None]  # (B, 1, T, end)
        if end > limit:
            raise ValueError(f"{end} positions do not fit into {limit}: positions are absolute, the window cannot slide")
        x = self.drop(self.wte(idx) + self.wpe(positions)) if hidden is None else hidden  # (B, T, C)
        for layer, block in enumerate(self.h[first:], first):
            rows = wanted if layer == self.config.n_layer - 1 else None
            if cache is None:
                x = self.run_block(block, x, rows)
            else:
                store = lambda k, v, layer=layer: cache.append(layer, k, v, positions, end)
                x = block(x, mask, store, rows)
        if cache is not None:
            cache.length = positions[:, -1] + 1
        if wanted is not None and first == self.config.n_layer:  # no block was left to choose them
            x = x.flatten(0, 1)[wanted]
        return self.ln_f(x)

    def hidden_states(self, idx: Tensor, layer: int) -> Tensor:
        """What enters block `layer`: (B, T) int64 -> (B, T, C). Where every block below is frozen, once is enough."""
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device)))
        for block in self.h[:layer]:
            x = self.run_block(block, x, None)
        return x

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) int64 -> logits (B, T, V)."""
        return self.lm_head(self.features(idx))

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, **overrides) -> "GPT":
        """
        The model of a Hugging Face GPT-2 folder, in float32 whatever the file's dtype. `overrides` may be
        dropout and tie_word_embeddings (False gives the head its own copy of the embedding). The model is in
        training mode, as torch makes it: call eval() before using its logits.

        Strict: FileNotFoundError for what is missing on the disk, ValueError for a tensor that is missing,
        unexpected, misshapen or not finite, and for a config that means another model than this one.
        """
        folder = model_folder(name_or_folder)
        unknown = set(overrides) - {"dropout", "tie_word_embeddings"}
        if unknown:
            raise ValueError(f"cannot override {sorted(unknown)}: only dropout and tie_word_embeddings")
        config = read_config(folder / "config.json", overrides.get("dropout"))
        entries = {}  # our name -> (file, header entry)
        for path, header in checkpoint_files(folder):
            for name, entry in header.items():
                name = name.removeprefix("transformer.")
                if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name):
                    continue  # the causal mask, which old files carry
                if name in entries:
                    raise ValueError(f"{path}: tensor {name} is there twice")
                entries[name] = (path, entry)

        tied_in_file = config.tie_word_embeddings
        if tied_in_file and "lm_head.weight" in entries and "wte.weight" in entries:
            head, wte = (_read_entry(*entries[n]) for n in ("lm_head.weight", "wte.weight"))
            tied_in_file = torch.equal(head, wte)
            if tied_in_file:
                del entries["lm_head.weight"]
        tied = overrides.get("tie_word_embeddings", tied_in_file)
        if tied and not tied_in_file:
            raise ValueError(f"{folder}: the head is a tensor of its own, so it cannot be tied to the embedding")

        if config.n_layer > len(entries):
            raise ValueError(f"{folder}: the config says {config.n_layer} blocks, the files hold {len(entries)} tensors")
        with torch.device("meta"):  # no memory before the shapes are checked, no time spent on random weights
            model = cls(replace(config, tie_word_embeddings=tied))
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if tied_in_file:
            expected.pop("lm_head.weight", None)
        check_names(folder, set(expected), set(entries))
        for name, shape in expected.items():
            path, entry = entries[name]
            dtype, found, *_ = entry
            shape = shape[::-1] if name.endswith(CONV1D) else shape
            if found != shape:
                raise ValueError(f"{path}: tensor {name} has shape {found}, the config says {shape}")
            if not dtype.is_floating_point:
                raise ValueError(f"{path}: tensor {name} has dtype {dtype}: weights are floating-point numbers")
            tensor = _read_entry(path, entry)
            tensor = (tensor.t().contiguous() if name.endswith(CONV1D) else tensor).float()
            if not all(map(math.isfinite, tensor.aminmax())):  # NaN is in both; isfinite() would copy the tensor
                raise ValueError(f"{path}: tensor {name} holds NaN or inf")
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
        if tied_in_file:
            model.lm_head.weight = model.wte.weight if tied else nn.Parameter(model.wte.weight.detach().clone())
        return model

    def save_pretrained(self, folder: str | Path, base_only: bool = False, eos_id: int | None = None) -> None:
        """
        Write config.json and model.safetensors as transformers' GPT2LMHeadModel has them. Complete files
        are renamed into place, config.json last. `eos_id` is the end token (default: the last id, as GPT-2's).
        Raises ValueError if the model holds parameters that GPT-2 does not have (adapters that were not merged),
        unless `base_only` says to leave them out.
        """
        folder = Path(folder)
        with torch.device("meta"):  # names only
            own = [name for name, _ in GPT(self.config).named_parameters()]
        mine = dict(self.named_parameters())
        extra = sorted(set(mine) - set(own))
        if extra and not base_only:
            raise ValueError(f"{extra[0]} is not a parameter of GPT-2: merge the adapters first, or save the base only")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name in own:
            key = name if name == "lm_head.weight" else "transformer." + name
            tensors[key] = mine[name].t() if name.endswith(CONV1D) else mine[name]
        write_safetensors(folder / "model.safetensors", tensors)
        dtype = str(self.wte.weight.dtype).removeprefix("torch.")
        write_json(folder / "config.json", hf_config(self.config, dtype, eos_id))


# ---------------------------------------------------------------------------------------------
# download


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https only, never back from https; keeps what the hub says of a file."""

    linked = None  # headers of the Hugging Face hub's redirect: they carry the file's size and sha256

    def redirect_request(self, request, file, code, message, headers, url):
        if not url.startswith(("https:", f"{request.type}:")):
            raise urllib.error.HTTPError(url, code, f"redirected to {url}", headers, file)
        self.linked = headers if "X-Linked-Etag" in headers else self.linked
        return super().redirect_request(request, file, code, message, headers, url)


def receive(url: str, file) -> str | None:
    """Append the missing part of url to file; returns the sha256 that the Hugging Face hub states.

    Raises as urllib and http.client, ConnectionError where too little comes, ValueError where the
    server contradicts itself. The next call resumes where this one stopped.
    """
    host, redirects = urllib.parse.urlsplit(url).hostname or "", Redirects()
    local = host in ("localhost", "::1") or host.startswith("127.")  # not reached through a proxy
    proxies = urllib.request.ProxyHandler({} if local else None)
    headers = {"User-Agent": "gpt2-finetune"}  # some servers refuse urllib's own
    headers |= {"Range": f"bytes={file.tell()}-"} if file.tell() else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.build_opener(redirects, proxies).open(request, timeout=30) as answer:
        if (coding := answer.headers.get("Content-Encoding", "identity")) != "identity":
            raise ValueError(f"{url}: the server sends it as {coding}, which was not asked for")
        part = re.match(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if answer.status == 206 and not part:
            raise ValueError(f"{url}: the server does not say which bytes of how many it sends")
        begin = int(part[1]) if part else 0  # a server that does not know Range begins anew
        end = begin + (answer.length or 0)
        linked = redirects.linked or answer.headers
        size = int(linked.get("X-Linked-Size", part[2] if part else end))
        if begin > file.tell() or not begin < end == size:
            raise ValueError(f"{url}: the server announces bytes {begin} to {end} of {size}")
        file.seek(begin)
        file.truncate()
        terminal, shown, due = sys.stderr.isatty(), False, time.monotonic() + 2
        while chunk := answer.read(2**16):
            file.write(chunk)
            if time.monotonic() > due:
                line = f"fetching {url.rpartition('/')[2]}: {file.tell() >> 20} of {size >> 20} MiB"
                print(line, end="\r" if terminal else "\n", file=sys.stderr, flush=True)
                shown, due = True, time.monotonic() + (0.2 if terminal else 30)
        if shown and terminal:
            print(file=sys.stderr)
    if file.tell() < size:
        raise ConnectionError(f"only {file.tell()} of {size} bytes came")
    # The ETag is no substitute: those of the hub's CDN and of GitHub are other hashes of the same length.
    tag = re.search(r"\b[0-9a-f]{64}\b", linked.get("X-Linked-Etag", ""))
    return tag and tag[0]


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Fetch a file by http or https, whole or not at all; where that takes long, stderr says so.

    A transfer that breaks is continued. Its length is checked, and its sha256, where it is given or
    the Hugging Face hub states it. Raises OSError where network, server or disk fail, ValueError
    where something else than the file comes.
    """
    if not re.match("https?://[^/]", url):
        raise ValueError(f"{url} is no http or https address")
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")  # others may fetch it too
    longest = failures = 0
    try:
        with open(temp, "x+b") as file:
            while True:
                try:
                    stated = receive(url, file)
                    break
                except (OSError, http.client.HTTPException) as error:
                    status = getattr(error, "code", 0)
                    why = error if status else getattr(error, "reason", error)
                    unreachable = type(error) is urllib.error.URLError and not longest
                    failures = 1 if file.tell() > longest else failures + 1
                    longest = max(longest, file.tell())
                    if unreachable or failures == 5 or 300 <= status < 500 and status != 429:
                        raise OSError(f"{url}: {' '.join(str(why).split())}") from None
                    time.sleep(2**failures / 2)
            file.seek(0)
            if file.read(100).lstrip().lower().startswith((b"<!doctype", b"<html")):
                raise ValueError(f"{url}: a web page came in place of the file")
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != (sha256 or stated or found):
                raise ValueError(f"{url}: sha256 {found} came, expected {sha256 or stated}")
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# the checkpoint folder

PUBLISHED = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
PUBLISHED["distilgpt2"] = "distilbert/distilgpt2"
FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")


def model_folder(name_or_folder: str | Path) -> Path:
    """
    The folder of a model given by name or path (a Path is a folder, also where its name is a model's). Missing files
    of a published model are first downloaded, from HF_ENDPOINT into HF_HOME; where all is there, nothing is asked.
    FileNotFoundError where there is no such model.
    """
    name = name_or_folder if isinstance(name_or_folder, str) else None
    if name == "tiny":
        return Path(__file__).resolve().parent / "tiny" / "model"
    if name in PUBLISHED:
        cache = os.environ.get("HF_HOME") or "~/.cache/huggingface"
        folder = Path(cache).expanduser() / "gpt2-finetune" / name
        url = f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/{PUBLISHED[name]}"
        try:
            for file in FILES:
                if not (folder / file).is_file():
                    download(f"{url}/resolve/main/{file}", folder / file)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{name}: {error}; or put {', '.join(FILES)} of {url} into {folder}") from None
        return folder
    folder = Path(name_or_folder)
    if not folder.is_dir():
        names = ", ".join(["tiny", *PUBLISHED])
        raise FileNotFoundError(f"no model folder {folder} (a folder with config.json, or a name: {names})")
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter").is_dir():
        base = f"give {folder / 'model'} for its base alone, or " if (folder / "model").is_dir() else ""
        raise ValueError(f"{folder}: the run's adapter is not part of a model; {base}merge it first (lora.py merge)")
    # A run folder; else the caller says what is missing.
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


# What the config must say for the logits to be GPT-2's; an absent key means the first value.
SUPPORTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
FIELDS = {"n_positions": "block_size"} | {name: name for name in (  # key of config.json -> field of GPTConfig
    "vocab_size", "n_layer", "n_head", "n_embd", "layer_norm_epsilon", "tie_word_embeddings")}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def read_config(path: Path, dropout: float | None = None) -> GPTConfig:
    """
    GPTConfig from a Hugging Face config.json; `dropout` takes the place of its three probabilities.
    ValueError for a setting that would change the logits and is not supported, or a size that makes no sense.
    """
    raw = read_json(path)
    for key, values in SUPPORTED.items():
        if raw.get(key, values[0]) not in values:
            raise ValueError(f"{path}: {key} {raw[key]!r} is not supported (only {values[0]!r})")
    if dropout is None:
        dropout, *others = (raw.get(key, 0.1) for key in DROPOUTS)
        if others != [dropout, dropout]:
            raise ValueError(f"{path}: {', '.join(DROPOUTS)} differ: give one dropout")
    try:
        config = GPTConfig(dropout=dropout, **{field: raw[key] for key, field in FIELDS.items() if key in raw})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if raw.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"{path}: n_inner {raw['n_inner']!r} is not supported (only 4 x n_embd)")
    return config


def hf_config(config: GPTConfig, dtype: str, eos_id: int | None = None) -> dict:
    """The config.json that transformers reads as this model."""
    eos = config.vocab_size - 1 if eos_id is None else eos_id
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        **{key: getattr(config, field) for key, field in FIELDS.items()}, "n_ctx": config.block_size, "n_inner": None,
        **dict.fromkeys(DROPOUTS, config.dropout), "bos_token_id": eos, "eos_token_id": eos,
        "dtype": dtype, "torch_dtype": dtype,
    }


def checkpoint_files(folder: Path) -> list[tuple[Path, dict]]:
    """The weight files of a folder, each with its header: one file, or the shards of an index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [(single, read_header(single))]
    if not index.is_file():
        others = [p.name for p in folder.glob("*.bin")]
        hint = f"; {others[0]} is a pickle: convert it to safetensors" if others else ""
        raise FileNotFoundError(f"{folder}: no model.safetensors and no model.safetensors.index.json{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map")
    files = []
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise ValueError(f"{index}: shard {shard!r} is not a plain file name")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard}: this shard of {index.name} is missing")
        files.append((folder / shard, read_header(folder / shard)))
        check_names(folder / shard, {n for n, s in weight_map.items() if s == shard}, set(files[-1][1]))
    return files


def check_names(where: Path, expected: set[str], found: set[str]) -> None:
    """ValueError that lists up to five names that are missing, else up to five that are unexpected."""
    for what, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
            raise ValueError(f"{where}: {len(names)} {what} tensor{'s'[:len(names) > 1]}: {shown}")


def read_json(path: Path) -> dict:
    """A JSON object from a file; FileNotFoundError or ValueError name the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


@contextmanager
def _replacing(path: Path):
    """A temporary name for what is to be `path`, renamed when it is written: a reader never sees half a file."""
    temp = path.with_name(path.name + ".tmp")
    try:
        yield temp
        os.replace(temp, path)
    except OSError as error:
        error.filename = str(path)  # a full disk's error carries no file name
        raise
    finally:
        temp.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    """Write JSON, whole or not at all."""
    with _replacing(path) as temp:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        temp.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path may hold a lone surrogate


# ---------------------------------------------------------------------------------------------
# safetensors: u64 header length | JSON header | packed little-endian tensors

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}


def _unique(pairs: list) -> dict:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
    return dict(pairs)


def read_header(path: Path) -> dict[str, tuple]:
    """
    name -> (dtype, shape, position in the file, bytes) of a safetensors file. ValueError unless the tensors
    tile the file exactly: a truncated download, a git-lfs pointer or a crafted header does not.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds something other than text")
        entries, position = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if not name.isprintable():  # it could control the terminal
                raise ValueError(f"tensor name {name!r}")
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"dtype {entry['dtype']!r} of tensor {name} is not supported")
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (*shape, begin, end)) or math.prod(n or 1 for n in shape) >= 2**48:
                raise ValueError(f"tensor {name} has shape {shape} at {begin}:{end}")
            if begin != position or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name} of shape {shape} at {begin}:{end} does not fill the bytes from {position}")
            entries[name] = (dtype, shape, 8 + length + begin, end - begin)
            position = end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: broken safetensors header ({error})") from None
    if 8 + length + position != size:
        raise ValueError(f"{path}: {size} bytes, but the header describes {8 + length + position}: cut short or damaged")
    return entries


def _read_entry(path: Path, entry: tuple) -> Tensor:
    dtype, shape, begin, nbytes = entry
    tensor = torch.empty(shape, dtype=dtype)
    if nbytes:
        with open(path, "rb") as file:
            file.seek(begin)
            if file.readinto((ctypes.c_char * nbytes).from_address(tensor.data_ptr())) != nbytes:
                raise ValueError(f"{path}: cut short")
    return tensor


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU in the file's dtypes. Raises as `read_header`."""
    return {name: _read_entry(path, entry) for name, entry in read_header(path).items()}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors (any layout or device), whole or not at all, and synced to the disk."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        t = tensors[name]
        end = position + t.nbytes
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with _replacing(path) as temp, open(temp, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            t = tensors[name].detach().cpu().contiguous()  # one tensor at a time: no second copy of the model
            if t.numel():
                file.write((ctypes.c_char * t.nbytes).from_address(t.data_ptr()))
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------
# generation


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, u: Tensor | None) -> Tensor:
    """
    Next ids (B,) from logits (B, V): the largest at temperature 0, else a draw after keeping the top_k
    largest and then the smallest set whose probability reaches top_p (nucleus sampling, arXiv 1904.09751).
    u: for a draw, one uniform number in [0, 1) for each row.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    V = logits.shape[-1]
    values, ids = logits.float().topk(min(top_k or V, V))  # (B, k), descending; exactly k, also among equals
    probs = F.softmax((values - values[:, :1]) / max(temperature, 1e-30), dim=-1)  # nothing overflows as it goes to zero
    if top_p is not None and top_p < 1:  # compared is the mass of the better ones: zero for the first, which stays
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)
    mass = probs.cumsum(dim=-1)
    choice = torch.searchsorted(mass, (1 - u[:, None]) * mass[:, -1:])  # above 0 and up to all of it: never a zero probability
    return ids.gather(1, choice)[:, 0]


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, *, eos_id: int | None = None,
             temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
             seed: int | None = None) -> list[list[int]]:
    """
    Continue prompts of different lengths in one batch; returns only the new ids, without eos. A row ends at
    eos_id, after max_new_tokens, or when prompt and answer fill block_size, and costs nothing from then on.
    What all prompts begin with (a template's preamble) is computed once.
    ValueError for an empty prompt, one that leaves no room for one id, an id outside the vocabulary, and
    sampling options that would have no effect.
    """
    config, device = model.config, model.wte.weight.device
    check_generation(config, prompts, max_new_tokens, temperature, top_k, top_p)
    if not prompts:
        return []
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    room = [min(max_new_tokens, config.block_size - len(p)) for p in prompts]  # new ids that each row may have
    longest = max(map(len, prompts))
    new_cache = lambda rows, length: KVCache(config, rows, length, device, model.wte.weight.dtype)
    cache = new_cache(len(prompts), min(config.block_size, longest + max_new_tokens))
    rows, answers = list(range(len(prompts))), [[] for _ in prompts]  # rows: the prompt in each place of the batch

    modes = [(module, module.training) for module in model.modules()]
    adapters = [(module, module.active) for module in model.modules() if isinstance(getattr(module, "active", None), list)]
    model.eval()
    try:
        shared = os.path.commonprefix([p[:-1] for p in prompts]) if len(prompts) > 1 and not adapters else []
        if shared:
            prefix = new_cache(1, len(shared))
            model.features(torch.tensor([shared], device=device), prefix)
            cache.start(prefix)
        # Padded on the right: a row's pad positions are overwritten by its own new tokens before they are seen.
        idx = torch.tensor([p[len(shared):] + [0] * (longest - len(p)) for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        hidden = model.features(idx, cache)[rows, lengths - len(shared) - 1]  # (B, C): each row's last prompt token
        cache.length = lengths
        while True:
            # Drawn for every prompt, so that which rows are still in the batch changes nothing for the others.
            u = torch.rand(len(prompts), generator=generator, device=device)[rows] if temperature else None
            ids = sample(model.lm_head(hidden), temperature, top_k, top_p, u)  # (B,)
            going = []
            for place, (row, token) in enumerate(zip(rows, ids.tolist())):
                if token != eos_id:
                    answers[row].append(token)
                    if len(answers[row]) < room[row]:
                        going.append(place)
            if not going:
                return answers
            if len(going) < len(rows):
                order = cache.keep(going)
                rows, ids = [rows[place] for place in order], ids[order]
                for module, _ in adapters:  # one for each row, see lora.use_lora
                    module.active = [module.active[place] for place in order]
            hidden = model.features(ids[:, None], cache)[:, -1]
    finally:
        for module, training in modes:
            module.training = training
        for module, active in adapters:
            module.active = active


def check_generation(config: GPTConfig, prompts, max_new_tokens, temperature, top_k, top_p) -> None:
    """The conditions of `generate`, each with its message."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty")
        if len(prompt) >= config.block_size:
            raise ValueError(f"prompt {i} has {len(prompt)} ids and block_size is {config.block_size}: no room to answer")
        if not all(0 <= i < config.vocab_size for i in prompt):
            raise ValueError(f"prompt {i} holds an id outside the vocabulary of {config.vocab_size}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be zero or above, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    if temperature == 0 and not (top_k is None and top_p is None):
        raise ValueError("top_k and top_p have no effect at temperature 0, which takes the largest logit")


def parse_args(argv=None):
    """Command line of `python gpt.py`."""
    parser = argparse.ArgumentParser(description="Continue a text with a GPT-2 model.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    parser.add_argument("--model", default="tiny", help="a model folder, a run folder, or a name")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=50, help="stop after this many tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that hold this probability")
    parser.add_argument("--seed", type=int, default=123, help="of the draws")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed}: must be at least 0 and below 2**63")
    if not args.model:  # from a shell variable that was never set; a path would take it for the working directory
        parser.error("--model: must not be empty")
    return args


def main(argv=None) -> int:
    """Print a prompt and its continuation; returns the exit code."""
    args = parse_args(argv)
    from evaluate import decode, load_model

    loaded = False
    try:
        model, tokenizer = load_model(args.model, "cpu")
        loaded, ids = True, tokenizer.encode_ordinary(args.prompt)
        new = generate(model, [ids], args.max_new_tokens, eos_id=tokenizer.eot_token, temperature=args.temperature,
                       top_k=args.top_k, top_p=args.top_p, seed=args.seed)[0]
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if loaded else 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"error: out of memory: --model {args.model} does not fit: take a smaller one, or lower --max-new-tokens",
              file=sys.stderr)
        return 1
    try:
        print(decode(tokenizer, ids + new), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at exit
        if not isinstance(error, BrokenPipeError):  # else the reader has seen enough (| head)
            print(f"error: standard output: {error.strerror}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    if sys.stdout:  # None when closed (>&-)
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
