# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0"]
# ///
"""
Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): add, switch, merge, save, load, combine.

`LoRALinear` is the nn.Linear it was, with its weight under the same name in the same storage, plus named pairs of small
matrices A [r, in] and B [out, r]:  y = W x + b + s B A x,  s = alpha / r (rsLoRA, arXiv 2312.03732: alpha / sqrt(r)).
Nothing here freezes or unfreezes a parameter: new matrices are born trainable, and what trains is the caller's decision.

An adapter on the disk is a PEFT folder, checked against peft in both directions for GPT-2's module names. DoRA is left out.

    python lora.py show runs/X/adapter
    python lora.py merge --base tiny --adapter runs/X/adapter --out merged
    python lora.py combine --adapter runs/X/adapter=0.5 --adapter runs/Y/adapter=0.5 --out mixed
"""

import argparse
import ctypes
import json
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so without numpy, which is not needed
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter does in one layer; ValueError for a value that means nothing."""

    r: int  # rank
    alpha: float
    dropout: float = 0.0  # on the input of A, while training
    rslora: bool = False

    def __post_init__(self):
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"r must be a positive integer, not {self.r!r}")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < 2**127:  # float32 holds it
            raise ValueError(f"alpha must be a number above zero, below 2**127, not {self.alpha!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout!r}")
        if type(self.rslora) is not bool:
            raise ValueError(f"rslora must be true or false, not {self.rslora!r}")

    @property
    def scale(self) -> float:
        """The factor s of B A."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class LoRALinear(nn.Linear):
    """
    A linear layer (..., in) -> (..., out) with adapters by name, of which one, none, or one per batch row is active.
    A and B are float32 (at least) whatever the dtype of the weight, as in PEFT: small updates vanish in bfloat16.
    The sum is cast back, so the output has the dtype of the plain layer's.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> "LoRALinear":
        """The same module as a LoRALinear: in place, so whoever holds it or its parameters still does."""
        if not isinstance(linear, cls):
            linear.__class__ = cls
            linear.lora_A, linear.lora_B = nn.ParameterDict(), nn.ParameterDict()  # name -> [r, in], [out, r]
            linear.configs = {}  # name -> LoRAConfig
            linear.active = None  # a name, None, or a list of them: one per batch row
        return linear

    def add_adapter(self, name: str, config: LoRAConfig, A: Tensor | None = None, B: Tensor | None = None):
        """A new adapter: A [r, in] and B [out, r] as given, or the identity (A Kaiming-uniform, B zero)."""
        place = {"device": self.weight.device, "dtype": torch.promote_types(self.weight.dtype, torch.float32)}
        if A is None:
            A = nn.init.kaiming_uniform_(torch.empty(config.r, self.in_features, **place), a=math.sqrt(5))
            B = torch.zeros(self.out_features, config.r, **place)
        self.lora_A[name] = nn.Parameter(A.to(**place))
        self.lora_B[name] = nn.Parameter(B.to(**place))
        self.configs[name] = config

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not isinstance(self.active, list):
            return self._adapt(self.active, x, y) if self.active in self.configs else y
        if len(self.active) != len(x):
            raise ValueError(f"use_lora was given {len(self.active)} rows, but the batch has {len(x)}")
        for name in [n for n in self.configs if n in self.active]:  # in one order: each draws its dropout
            rows = torch.tensor([i for i, n in enumerate(self.active) if n == name], device=x.device)
            y = y.index_copy(0, rows, self._adapt(name, x[rows], y[rows]))
        return y

    def _adapt(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        A, B, config = self.lora_A[name], self.lora_B[name], self.configs[name]
        x = F.dropout(x.to(A.dtype), config.dropout, self.training)
        x = F.linear(x, A).reshape(-1, config.r)  # (N, r)
        # Product and sum in one call: the product alone would be as large as y.
        sums = torch.addmm(y.to(x.dtype).reshape(-1, self.out_features), x, B.t(), alpha=config.scale)
        return sums.to(y.dtype).view_as(y)

    @torch.no_grad()
    def merged_weight(self, name: str) -> Tensor:
        """W + s B A [out, in], summed in float32 (at least), in W's dtype."""
        # The product in float64 on the CPU: there neither autocast nor TF32 makes it less than float32.
        delta = self.lora_B[name].cpu().double() @ self.lora_A[name].cpu().double() * self.configs[name].scale
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return (self.weight.to(dtype) + delta.to(dtype).to(self.weight.device)).to(self.weight.dtype)


# ---------------------------------------------------------------------------------------------
# adapters of a model


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    # Not other subclasses: they have a forward of their own, or have their weight used without a call of forward.
    return {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, LoRALinear)}


def _adapters(model: nn.Module) -> dict[str, dict[str, LoRALinear]]:
    """adapter name -> the layers that hold it, by module name."""
    adapters = {}
    for name, layer in _linears(model).items():
        for adapter in getattr(layer, "configs", ()):
            adapters.setdefault(adapter, {})[name] = layer
    return adapters


def _adapter(model: nn.Module, name: str) -> dict[str, LoRALinear]:
    """The layers that hold this adapter; ValueError if none does."""
    adapters = _adapters(model)
    if name not in adapters:
        there = ", ".join(adapters) or "none (a merged adapter is part of the weights)"
        raise ValueError(f"the model has no adapter {name!r}; it has {there}")
    return adapters[name]


def _hits(names, target: str) -> set[str]:
    """The names that match a pattern with *, or end in these components: attn.c_proj ends in c_proj, not in proj."""
    return {n for n in names if (fnmatchcase(n, target) if "*" in target else ("." + n).endswith("." + target))}


def _select(names, targets) -> set[str]:
    """The names that the targets hit; ValueError for a target that hits none."""
    hits = {target: _hits(names, target) for target in targets}
    for target in (t for t, found in hits.items() if not found):
        there = sorted({n.split(".")[-1] for n in names})
        raise ValueError(f"target {target!r} hits no linear layer; their names end in {', '.join(there)}")
    if not hits:
        raise ValueError("no targets: the adapter would be empty")
    return set().union(*hits.values())


def _add(model: nn.Module, adapter: str, layers: dict) -> None:
    """Add an adapter, module name -> arguments of add_adapter, and make it active; all checks come first."""
    # Parameter names are dotted, and ParameterDict keeps its entries as attributes beside its methods.
    if not re.fullmatch(r"[\w-]+", adapter) or hasattr(nn.ParameterDict(), adapter):
        raise ValueError(f"{adapter!r} cannot name an adapter: take letters, digits, _ and - (no dict method)")
    if adapter in _adapters(model):
        raise ValueError(f"the model already has an adapter {adapter!r}: choose another name")
    place = lambda p: p.data_ptr() or id(p)  # none on the meta device
    linears, owners = _linears(model), Counter(place(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in layers:
        if owners[place(linears[name].weight)] > 1:
            raise ValueError(f"{name} shares its weight with another module, which merging would change too: "
                             "untie it (tie_word_embeddings=False) or leave it out of the targets")
    for name in linears:  # in the model's order: one seed, one initialization, however targets are ordered
        if name in layers:
            LoRALinear.of(linears[name]).add_adapter(adapter, *layers[name])
    use_lora(model, adapter)


def add_lora(model: nn.Module, r: int = 8, alpha: float = 16, targets=("c_attn", "c_proj", "c_fc"),
             dropout: float = 0.0, rslora: bool = False, name: str = "default") -> None:
    """
    Add an adapter and make it active. The model computes what it did (B = 0) until B has been trained.
    `targets`: suffixes of dotted module names ("attn.c_proj" hits only that one) or patterns with *.
    ValueError for a target that hits no linear layer, a name that is taken, a tied weight, a bad number.
    """
    config = LoRAConfig(r, alpha, dropout, rslora)
    _add(model, name, {n: (config,) for n in _select(_linears(model), [targets] if isinstance(targets, str) else targets)})


def use_lora(model: nn.Module, name: str | None | list[str | None]) -> None:
    """
    Make an adapter active; None: the base alone; a list: one name or None per batch row (dimension 0).
    Layers that lack an active adapter compute as the base. What is trainable does not change.
    ValueError for an unknown name; `forward` raises one if a list is not as long as the batch.
    """
    per_row = isinstance(name, (list, tuple))
    for n in set(name if per_row else [name]) - {None}:
        _adapter(model, n)
    for module in _linears(model).values():
        if isinstance(module, LoRALinear):
            module.active = list(name) if per_row else name


def merge_lora(model: nn.Module, name: str = "default") -> None:
    """
    Fold an adapter into the weights, in place: W += s B A in float32, rounded once to W's dtype; plain nn.Linear remain.
    ValueError, with the model untouched, if there is no such adapter (merged already), if there are others (they were
    trained on the weights that would change), or if a merged weight is not finite.
    """
    layers = _adapter(model, name)
    others = [n for n in _adapters(model) if n != name]
    if others:
        raise ValueError(f"the model also holds {', '.join(others)}: merge {name!r} where it is alone")
    for n, layer in layers.items():
        if not torch.isfinite(layer.merged_weight(name)).all():
            raise ValueError(f"merging {name!r} would make {n}.weight NaN or inf")
    for layer in layers.values():
        layer.weight.detach().copy_(layer.merged_weight(name))
        del layer.lora_A, layer.lora_B, layer.configs, layer.active
        layer.__class__ = nn.Linear


def lora_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The entries of model.state_dict() that belong to one adapter. ValueError if there is no such one."""
    return {f"{n}.{kind}.{name}": getattr(layer, kind)[name].detach()
            for n, layer in _adapter(model, name).items() for kind in ("lora_A", "lora_B")}


# ---------------------------------------------------------------------------------------------
# PEFT folders: adapter_config.json + adapter_model.safetensors

# Options that are read below, or that do not change what a trained adapter computes; any other one that is set is refused.
KNOWN = set("""peft_type task_type base_model_name_or_path r lora_alpha lora_dropout target_modules rank_pattern
    alpha_pattern use_rslora bias init_lora_weights fan_in_fan_out inference_mode revision auto_mapping peft_version
    megatron_core qalora_group_size eva_config ensure_weight_tying""".split())
# Initializations that leave the base weights alone; the others (pissa, olora, ...) rewrite them on loading.
INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def _peft_path(name: str) -> str:
    """Where GPT2LMHeadModel has this module: all but the head lie in its `transformer`."""
    return name if name == "lm_head" else "transformer." + name


def write_adapter(folder: str | Path, layers: dict, targets, base: str) -> None:
    """
    Write a PEFT folder, the config last. layers: module name -> (LoRAConfig, A, B).
    ValueError if a matrix holds NaN or inf, before anything is written.
    """
    folder, paths, tensors = Path(folder), {}, {}
    for name, (config, A, B) in layers.items():
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise ValueError(f"A or B of {name} holds NaN or inf: not saved")
        path = _peft_path(name)
        paths[path] = config
        tensors |= {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B}
    common = Counter(paths.values()).most_common(1)[0][0]
    base = str(base or "")
    if base and (Path(base) / "config.json").is_file():
        base = str(Path(base).resolve())  # so that peft finds it from any working directory
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").unlink(missing_ok=True)  # an old config must not meet new weights
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": common.r, "lora_alpha": common.alpha, "lora_dropout": common.dropout, "use_rslora": common.rslora,
        "target_modules": sorted(targets), "fan_in_fan_out": True, "bias": "none", "inference_mode": True,
        "rank_pattern": {path: c.r for path, c in paths.items() if c.r != common.r},
        "alpha_pattern": {path: c.alpha for path, c in paths.items() if c.alpha != common.alpha},
        "use_dora": False, "modules_to_save": None, "init_lora_weights": True,
    })


def read_adapter(folder: str | Path) -> tuple[dict, dict]:
    """
    The config and the layers, module name -> (LoRAConfig, A [r, in], B [out, r]), of a PEFT folder, or of a run folder
    with one in `adapter`. FileNotFoundError for a missing file. ValueError for options that we do not have, by name,
    and for tensors that are unexpected, unpaired, misshapen or not finite.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file() and (folder / "adapter").is_dir():
        folder = folder / "adapter"
    files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file (an adapter is a folder with {files[0].name} and {files[1].name})")
    config, tensors = read_json(files[0]), read_safetensors(files[1])
    try:
        _check_options(config)
        return config, _parse_layers(config, tensors)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{folder}: {error}") from None


def _check_options(config: dict) -> None:
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):  # PEFT has silent defaults for the last three
        if key not in config:
            raise ValueError(f"adapter_config.json lacks {key}")
    for key, values in (("peft_type", ("LORA",)), ("bias", ("none", None)), ("init_lora_weights", INITS)):
        if config.get(key) not in values:
            raise ValueError(f"{key} {config[key]!r} is not supported")
    for key, value in config.items():
        if value and key not in KNOWN:
            raise ValueError(f"{key} is not supported (it is {value!r})")
    targets = config["target_modules"]
    if not isinstance(targets, (str, list)) or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"target_modules must be a list of names or one text, not {targets!r}")


def _parse_layers(config: dict, tensors: dict[str, Tensor]) -> dict:
    pairs, layers = {}, {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(?:transformer\.(?!lm_head)|(?=lm_head\.))([\w.]+)\.lora_([AB])\.weight",
                             key)
        if not match:
            raise ValueError(f"unexpected tensor {key}")
        if tensor.dim() != 2 or not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{key} is not a finite matrix ({tensor.dtype}, shape {tuple(tensor.shape)})")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise ValueError("it holds no tensors")
    for name, pair in pairs.items():
        if len(pair) < 2:
            raise ValueError(f"{name} has lora_{next(iter(pair))} only")

        def pick(key, default):  # the value of the first pattern that the module's path ends in, as PEFT has it
            patterns = (config.get(key) or {}).items()
            return next((v for p, v in patterns if re.match(rf"(.*\.)?({p})$", _peft_path(name))), default)

        layer = LoRAConfig(pick("rank_pattern", config["r"]), pick("alpha_pattern", config["lora_alpha"]),
                           config.get("lora_dropout", 0.0), config.get("use_rslora", False))
        A, B = pair["A"], pair["B"]
        if not A.shape[0] == B.shape[1] == layer.r:
            raise ValueError(f"{name} has rank {A.shape[0]} in A, {B.shape[1]} in B, {layer.r} in the config")
        layers[name] = (layer, A, B)
    return layers


def save_lora(model: nn.Module, folder: str | Path, name: str = "default", base: str = "gpt2") -> None:
    """
    Save an adapter as a PEFT folder. `base` is recorded for PEFT's use: a name on the hub, or a folder.
    ValueError if there is no such adapter (merged already) or it holds NaN or inf.
    """
    adapted, linears, targets = _adapter(model, name), _linears(model), set()
    for n in adapted:  # the shortest suffix that hits adapted layers only
        parts = n.split(".")
        suffixes = [".".join(parts[k:]) for k in reversed(range(len(parts)))]
        targets.add(next((s for s in suffixes if _hits(linears, s) <= adapted.keys()), n))
    layers = {n: (m.configs[name], m.lora_A[name].detach(), m.lora_B[name].detach()) for n, m in adapted.items()}
    write_adapter(folder, layers, targets, base)


def load_lora(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """
    Load a PEFT folder as a new adapter and make it active; other parameters stay as they are. Where PEFT only warns, or
    says nothing, this is a ValueError, with the model untouched: layers without tensors, tensors without layers (another
    depth, other targets), shapes that do not fit. For what else is raised see `read_adapter` and `add_lora`.
    """
    config, layers = read_adapter(folder)
    linears = _linears(model)
    try:
        expected = _peft_targets(config["target_modules"], linears)
    except (ValueError, re.error) as error:
        raise ValueError(f"{folder}: target_modules: {error}") from None
    for what, names in (("are targets but have no tensors", expected - set(layers)),
                        ("have tensors but are no targets in this model", set(layers) - expected)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
            raise ValueError(f"{folder}: {len(names)} layers {what}: {shown}")
    for n, (_, A, B) in layers.items():
        if (len(B), A.shape[1]) != (shape := (linears[n].out_features, linears[n].in_features)):
            raise ValueError(f"{folder}: the adapter's {n} is {(len(B), A.shape[1])}, the model's {shape}")
    _add(model, name, layers)


def _peft_targets(targets: str | list[str], names) -> set[str]:
    """The modules that PEFT's target_modules hits: suffixes, one regular expression, or "all-linear"."""
    paths = {_peft_path(n): n for n in names}
    if not isinstance(targets, str):
        return {paths[p] for p in _select(paths, targets)}
    if targets.lower() == "all-linear":
        return {n for n in names if n != "lm_head"}
    return {n for p, n in paths.items() if re.fullmatch(targets, p)}


# ---------------------------------------------------------------------------------------------
# files: the same functions as in gpt.py, so that this file can be copied alone

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
# command line

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def show(args) -> str:
    """List an adapter's settings, its size, and how far it moves each weight."""
    config, layers = read_adapter(args.folder)
    targets, matrices = config["target_modules"], [t for _, A, B in layers.values() for t in (A, B)]
    width = max(map(len, layers))
    plain = lambda text: text if str(text).isprintable() else repr(text)  # a stranger's file must not control the terminal
    lines = [f"base     {plain(config.get('base_model_name_or_path'))}",
             f"targets  {plain(targets if isinstance(targets, str) else ', '.join(targets))}",
             f"size     {len(layers)} layers, {sum(t.numel() for t in matrices):,} parameters, {sum(t.nbytes for t in matrices):,} bytes",
             "", f"{'layer':{width}}  {'out x in':>13}  {'r':>4}  {'alpha':>6}  {'s':>6}  norm of s B A"]
    for name in sorted(layers, key=lambda n: re.sub(r"\d+", lambda m: m[0].zfill(4), n)):
        c, A, B = layers[name]
        A, B = A.double(), B.double()
        norm = c.scale * ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()  # without forming B A
        lines.append(f"{name:{width}}  {f'{len(B)} x {A.shape[1]}':>13}  {c.r:4}  {c.alpha:6g}  {c.scale:6.4g}  {norm:.4g}")
    return "\n".join(lines)


def merge(args) -> str:
    """Write base + adapter as a plain model folder."""
    from gpt import GPT, model_folder

    out = _free(args.out)
    source = model_folder(args.base)
    trained_on = str(read_adapter(args.adapter)[0].get("base_model_name_or_path") or "")
    if os.path.isabs(trained_on) and os.path.isdir(trained_on) and not os.path.samefile(trained_on, source):
        raise ValueError(f"{args.adapter} was trained on {trained_on}, not on {source}: give that as --base "
                         "(one model? correct base_model_name_or_path)")
    model = GPT.from_pretrained(source)
    load_lora(model, args.adapter)
    merge_lora(model)
    with _complete(out) as folder:
        eos_id = read_json(source / "config.json").get("eos_token_id")
        model.save_pretrained(folder, eos_id=eos_id if type(eos_id) is int else None)  # some models list several
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    return f"{args.base} + {args.adapter} -> {out}"


def combine(args) -> str:
    """
    Write the adapter whose delta is the weighted sum of the given ones': A stacked, w s B side by side.
    Exact, at the price of the sum of the ranks; averaging A and B instead would be another function.
    """
    out, parts, bases = _free(args.out), {}, {}
    for folder, weight in args.adapter:
        config, layers = read_adapter(folder)
        bases[str(config.get("base_model_name_or_path") or "")] = folder
        for name, (c, A, B) in layers.items():
            parts.setdefault(name, []).append((A.float(), B.float() * (weight * c.scale)))
    if len(bases) > 1:
        listed = ", ".join(f"{folder} {base!r}" for base, folder in bases.items())
        raise ValueError(f"the adapters have different bases: {listed} (one model? correct base_model_name_or_path)")
    layers = {}
    for name, pairs in parts.items():
        if len({(len(B), A.shape[1]) for A, B in pairs}) > 1:
            raise ValueError(f"the adapters have different shapes in {name}: they do not fit one model")
        As, Bs = zip(*pairs)
        A, B = torch.cat(As), torch.cat(Bs, dim=1)  # (sum of r, in), (out, sum of r)
        layers[name] = (LoRAConfig(r=len(A), alpha=len(A)), A, B)
    with _complete(out) as folder:
        write_adapter(folder, layers, map(_peft_path, layers), next(iter(bases)))
    return f"{' + '.join(f'{weight:g} * {folder}' for folder, weight in args.adapter)} -> {out}"


def _free(out: str) -> Path:
    """The path; ValueError if something is there."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there already: choose another folder or remove it")
    return out


@contextmanager
def _complete(out: Path):
    """A folder to write to, which becomes `out` when all is written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=out.name + ".") as temp:
        yield Path(temp) / "new"
        os.replace(Path(temp) / "new", out)


def _given(text: str) -> str:
    if not text:  # from a shell variable that was never set; a path would take it for the working directory
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _weighted(text: str) -> tuple[str, float]:
    folder, _, weight = text.rpartition("=")
    try:
        if folder and math.isfinite(float(weight)):
            return folder, float(weight)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not FOLDER=WEIGHT with a finite weight")


def parse_args(argv=None):
    """Command line of `python lora.py`."""
    parser = argparse.ArgumentParser(description="Show, merge and combine LoRA adapters (PEFT folders).")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("show", help="list an adapter", description=show.__doc__)
    command.add_argument("folder", type=_given, help="a PEFT adapter folder, or a run folder")
    command = commands.add_parser("merge", help="fold an adapter into its base", description=merge.__doc__)
    command.add_argument("--base", required=True, type=_given, metavar="M", help="the model: a folder or a name")
    command.add_argument("--adapter", required=True, type=_given, metavar="FOLDER",
                         help="a PEFT adapter folder, or a run folder")
    command.add_argument("--out", required=True, type=_given, metavar="FOLDER", help="the new model folder")
    command = commands.add_parser("combine", help="a weighted sum of adapters", description=combine.__doc__)
    command.add_argument("--adapter", required=True, action="extend", nargs="+", type=_weighted,
                         metavar="FOLDER=WEIGHT", help="an adapter and its factor; give several")
    command.add_argument("--out", required=True, type=_given, metavar="FOLDER", help="the new adapter folder")
    for each in (parser, *commands.choices.values()):
        each.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Run a subcommand; returns the exit code."""
    args = parse_args(argv)
    try:
        print({"show": show, "merge": merge, "combine": combine}[args.command](args), flush=True)
    except BrokenPipeError:  # the reader has seen enough (| head); nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        if isinstance(error, OSError) and error.errno and not error.filename:  # all other files are named
            error.filename = "standard output"
        memory = "" if isinstance(error, (OSError, ValueError)) else "out of memory: "
        print(f"error: {memory}{' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if sys.stdout:  # None when closed (>&-)
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
