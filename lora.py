"""
Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): add, switch, merge, save, load.

    y = W x + b + s B A x     A [r, in], B [out, r], s = alpha / r; rsLoRA: alpha / sqrt(r)

An adapted layer stays the nn.Linear it was, its weight under the same name in the same storage.
New matrices are born trainable; nothing here freezes or unfreezes a parameter.
Folders are PEFT's, checked against peft in both directions for GPT-2.

    python lora.py merge --base tiny --adapter runs/X=0.5 runs/Y=0.5 --out merged
"""

import argparse
import math
import re
import sys
import warnings
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LoRAConfig:
    r: int
    lora_alpha: float
    lora_dropout: float = 0.0  # on the input of A, while training
    use_rslora: bool = False  # arXiv 2312.03732

    def __post_init__(self):
        if not (self.r >= 1 and self.lora_alpha > 0 and 0 <= self.lora_dropout < 1):
            raise ValueError(f"r >= 1, alpha > 0, dropout in [0, 1) wanted, not {self}")

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoRALinear(nn.Linear):
    """
    A linear layer (..., in) -> (..., out) with adapters by name in lora_A, lora_B and configs;
    active: a name, None, or a list with one of them per row. A and B are float32, as in PEFT:
    bfloat16 loses small updates. The output has the dtype of the plain layer's.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not isinstance(self.active, list):
            return self.adapt(self.active, x, y) if self.active in self.configs else y
        if len(self.active) != len(x):
            raise ValueError(f"use_lora got {len(self.active)} rows, but the batch has {len(x)}")
        for name in [n for n in self.configs if n in self.active]:  # in one order: dropout draws
            rows = [i for i, n in enumerate(self.active) if n == name]
            y[rows] = self.adapt(name, x[rows], y[rows])
        return y

    def adapt(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        A, B, config = self.lora_A[name], self.lora_B[name], self.configs[name]
        x = F.dropout(x.to(A.dtype), config.lora_dropout, self.training)
        return (y + F.linear(F.linear(x, A) * config.scale, B)).to(y.dtype)


def _select(model: nn.Module, targets) -> dict[str, nn.Linear]:
    """The layers that the targets hit, in the model's order; all of them can be adapted."""
    linears = {n: m for n, m in model.named_modules()
               if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    chosen = set()
    for target in targets:
        hits = {n for n in linears if fnmatchcase(n, target) or f".{n}".endswith(f".{target}")}
        if not hits:
            raise ValueError(f"target {target!r} hits no linear layer of {', '.join(linears)}")
        chosen |= hits
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    read = {m for encoder in encoders for m in encoder.modules()}  # by a fast path, not called
    weights = [p.data_ptr() or id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for n in chosen:
        layer, kind, W = linears[n], type(linears[n]).__name__, linears[n].weight
        if type(layer) not in (nn.Linear, LoRALinear):
            kind = kind.replace("Conv1D", "transformers' Conv1D")
            raise ValueError(f"target {n} is {kind}, not nn.Linear")
        if layer in read or "forward" in vars(layer) or "weight" not in layer._parameters:
            raise ValueError(f"target {n}: its weight is not used by nn.Linear's own forward")
        if weights.count(W.data_ptr() or id(W)) > 1:
            raise ValueError(f"target {n} shares its weight: untie it (tie_word_embeddings=False)")
    return {n: layer for n, layer in linears.items() if n in chosen}


def _holders(model: nn.Module, name: str) -> dict[str, LoRALinear]:
    layers = {n: m for n, m in model.named_modules() if name in getattr(m, "configs", ())}
    if not layers:
        raise ValueError(f"no adapter {name!r} in the model (a merged one is part of the weights)")
    return layers


def _add(model: nn.Module, name: str, layers: list[tuple]) -> None:
    if any(name in getattr(m, "configs", ()) for m in model.modules()):
        raise ValueError(f"the model has an adapter {name!r} already: choose another name")
    for layer, config, A, B in layers:
        if type(layer) is nn.Linear:
            layer.__class__ = LoRALinear  # in place: who holds it or its weight still does
            layer.lora_A, layer.lora_B = nn.ParameterDict(), nn.ParameterDict()
            layer.configs = {}
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        layer.lora_A[name] = nn.Parameter(A.to(layer.weight.device, dtype))
        layer.lora_B[name] = nn.Parameter(B.to(layer.weight.device, dtype))
        layer.configs[name] = config
    use_lora(model, name)


def add_lora(model: nn.Module, r=8, alpha=16, targets=("c_attn", "c_proj", "c_fc"), dropout=0.0,
             rslora=False, name="default") -> None:
    """
    Add an adapter and make it active; until B is trained it changes nothing (B = 0). targets:
    suffixes of module names ("attn.c_proj" hits only that) or patterns with *. ValueError for one
    that hits nothing or cannot be adapted, a taken name, a bad number.
    """
    config, layers = LoRAConfig(r, alpha, dropout, rslora), []
    for layer in _select(model, [targets] if isinstance(targets, str) else targets).values():
        A = nn.init.kaiming_uniform_(torch.empty(r, layer.in_features), a=math.sqrt(5))
        layers.append((layer, config, A, torch.zeros(layer.out_features, r)))
    _add(model, name, layers)


def use_lora(model: nn.Module, name: str | None | list[str | None]) -> None:
    """
    Make an adapter active; None: the base; a list: one name or None per batch row. Layers without
    it compute as the base. ValueError for an unknown name.
    """
    for n in set(name if isinstance(name, list) else [name]) - {None}:
        _holders(model, n)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.active = name


@torch.no_grad()
def merge_lora(model: nn.Module, name="default", weight=1.0) -> None:
    """
    W += weight s B A, summed in float64; other adapters stay, a layer without any is a plain
    nn.Linear again. ValueError, and nothing is changed, if there is no such adapter (merged
    already) or a merged weight is not finite.
    """
    layers, merged = _holders(model, name), []
    for n, layer in layers.items():  # on the CPU: float64 exists, and autocast leaves it alone
        W, A, B = (t.cpu().double() for t in (layer.weight, layer.lora_A[name], layer.lora_B[name]))
        W = (W + weight * layer.configs[name].scale * B @ A).to(layer.weight.dtype)
        if not W.isfinite().all():
            raise ValueError(f"merging {name!r} would make {n}.weight NaN or inf")
        merged.append(W)
    for layer, W in zip(layers.values(), merged):
        layer.weight.copy_(W)
        del layer.lora_A[name], layer.lora_B[name], layer.configs[name]
        if not layer.configs:
            del layer.lora_A, layer.lora_B, layer.configs, layer.active
            layer.__class__ = nn.Linear


def lora_state_dict(model: nn.Module, name="default") -> dict[str, Tensor]:
    """The entries of model.state_dict() that are one adapter's."""
    return {f"{n}.{kind}.{name}": getattr(layer, kind)[name].detach()
            for n, layer in _holders(model, name).items() for kind in ("lora_A", "lora_B")}


# Options that are read, or change nothing that a trained adapter computes; no other may be set.
KNOWN = set("""peft_type task_type base_model_name_or_path r lora_alpha lora_dropout target_modules
    rank_pattern alpha_pattern use_rslora bias init_lora_weights fan_in_fan_out inference_mode
    revision auto_mapping peft_version megatron_core qalora_group_size""".split())
VALUES = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian"]}


def _peft_path(name: str) -> str:
    return name if name == "lm_head" else f"transformer.{name}"  # as in GPT2LMHeadModel


def save_lora(model: nn.Module, folder: str | Path, name="default", base="gpt2") -> None:
    """Write an adapter as a PEFT folder. base: its model, a hub name or a folder."""
    from gpt import write_json, write_safetensors

    folder, tensors = Path(folder), {}
    for key, tensor in lora_state_dict(model, name).items():
        tensors[f"base_model.model.{_peft_path(key.removesuffix(name))}weight"] = tensor
    configs = {_peft_path(n): layer.configs[name] for n, layer in _holders(model, name).items()}
    first = next(iter(configs.values()))
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", **vars(first), "fan_in_fan_out": True,
        "base_model_name_or_path": str(Path(base).resolve() if Path(base).is_dir() else base),
        "target_modules": sorted(configs),
        "rank_pattern": {p: c.r for p, c in configs.items() if c.r != first.r},
        "alpha_pattern": {p: c.lora_alpha for p, c in configs.items()
                          if c.lora_alpha != first.lora_alpha}})


def _read_adapter(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    from gpt import read_json, read_safetensors

    config = read_json(Path(folder, "adapter_config.json"))
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        if not config.get(key):  # PEFT takes a default without a word
            raise ValueError(f"{folder}: adapter_config.json lacks {key}")
    for key, value in config.items():
        if value and (key not in KNOWN or value not in VALUES.get(key, [value])):
            raise ValueError(f"{folder}: {key} {value!r} is not supported")
    if Path(folder, "adapter_model.bin").exists():
        raise ValueError(f"{folder}: adapter_model.bin is a pickle: save as safetensors with peft")
    return config, read_safetensors(Path(folder, "adapter_model.safetensors"))


def load_lora(model: nn.Module, folder: str | Path, name="default") -> None:
    """
    Add the adapter of a PEFT folder and make it active. ValueError, and nothing is changed, for an
    option that we do not have, a layer that cannot be adapted, and what PEFT passes over: a tensor
    that is missing, not of these settings and this model, misshapen or not finite.
    """
    config, tensors = _read_adapter(folder)
    targets, layers = config["target_modules"], []
    if isinstance(targets, str):  # one regular expression
        regex = r"(?!lm_head$).*" if targets == "all-linear" else targets
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        targets = [n for n in names if re.fullmatch(regex, _peft_path(n))]
    for n, layer in _select(model, [t.removeprefix("transformer.") for t in targets]).items():
        path = _peft_path(n)
        settings = {key: config[key] for key in LoRAConfig.__annotations__ if key in config}
        for key, patterns in ("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"):
            values = (config.get(patterns) or {}).items()
            hits = [v for p, v in values if re.match(rf"(.*\.)?({p})$", path)]
            settings[key] = [*hits, config[key]][0]  # as in PEFT: the first that the path ends in
        c = LoRAConfig(**settings)
        pair = [tensors.pop(f"base_model.model.{path}.lora_{kind}.weight", None) for kind in "AB"]
        shapes = [(c.r, layer.in_features), (layer.out_features, c.r)]
        for tensor, shape in zip(pair, shapes):
            if tensor is None or tensor.shape != shape or not tensor.isfinite().all():
                raise ValueError(f"{folder}: no finite lora_A and lora_B of shapes {shapes} for {n}")
        layers.append((layer, c, *pair))
    if tensors:
        raise ValueError(f"{folder}: {min(tensors)} is not of its targets in this model")
    _add(model, name, layers)


def _folder(path: str) -> Path:
    return Path(path, "adapter") if Path(path, "adapter").is_dir() else Path(path)


def run(args) -> None:
    from data import copy_tokenizer
    from gpt import GPT, model_folder, read_json

    if args.command == "show":
        config, tensors = _read_adapter(_folder(args.folder))
        for key, value in config.items():
            print(f"{key}: {value}")
        for key, tensor in tensors.items():
            print(f"{key} {list(tensor.shape)}, norm {tensor.float().norm():.4g}")
        return
    if args.out.exists():
        raise ValueError(f"--out {args.out} is there already: choose another folder or remove it")
    source = model_folder(args.base)
    model = GPT.from_pretrained(source)
    for text in args.adapter:
        path, weight = re.fullmatch(r"(.*?)(?:=([-+\d.e]+))?", text).groups()
        folder = _folder(path)
        trained_on = _read_adapter(folder)[0].get("base_model_name_or_path") or ""
        if Path(trained_on, "config.json").is_file() and not source.samefile(trained_on):
            raise ValueError(f"{folder} was trained on {trained_on}, not on --base {source}")
        load_lora(model, folder)
        merge_lora(model, weight=float(weight or 1))
    model.save_pretrained(args.out, eos_id=read_json(source / "config.json").get("eos_token_id"))
    copy_tokenizer(source, args.out)


def main(argv=None) -> int:
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    parser = argparse.ArgumentParser(description="Show or merge LoRA adapters.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print settings and tensors")
    show.add_argument("folder", help="a PEFT or run folder")
    merge = commands.add_parser("merge", help="write base + weighted adapters as a model folder")
    merge.add_argument("--base", required=True, help="model folder or name")
    merge.add_argument("--adapter", required=True, action="extend", nargs="+", metavar="F[=WEIGHT]")
    merge.add_argument("--out", required=True, type=Path)
    for each in parser, show, merge:
        each.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
