"""LoRA (Hu et al. 2021, arXiv 2106.09685): add, switch, merge, save, load low-rank adapters.

    y = W x + b + s B A x     A [r, in], B [out, r], s = alpha / r; rsLoRA: alpha / sqrt(r)

An adapted layer stays the nn.Linear it was, its weight's name and storage too. Folders are PEFT's.

    python lora.py merge --base tiny --adapter runs/X=0.5 runs/Y=0.5 --out merged
"""

import argparse
import re
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", "Failed.*NumPy")
import torch
from torch import nn

class LoRALinear(nn.Linear):
    """(..., in) -> (..., out), with adapters by name in lora_A, lora_B (float32, as in PEFT) and
    configs; active: a name, None, or a list of them, one per row."""
    def forward(self, x):
        y = super().forward(x)
        if not isinstance(self.active, list):
            return self.adapt(self.active, x, y) if self.active in self.configs else y
        if len(self.active) != len(x):
            raise ValueError(f"use_lora got {len(self.active)} rows, the batch has {len(x)}")
        for name in self.configs:  # in one order: dropout draws
            rows = [i for i, n in enumerate(self.active) if n == name]
            if rows:
                y[rows] = self.adapt(name, x[rows], y[rows])
        return y

    def adapt(self, name, x, y):
        A, B, rate = self.lora_A[name], self.lora_B[name], self.configs[name]["lora_dropout"]
        x = nn.functional.dropout(x.to(A.dtype), rate, self.training)
        return (y + x @ A.T * self.scale(name) @ B.T).to(y.dtype)

    def scale(self, name):
        c = self.configs[name]
        return c["lora_alpha"] / c["r"] ** (0.5 if c["use_rslora"] else 1)

def _select(model, patterns):
    linears = {n: m for n, m in model.named_modules()
               if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    hit = set()
    for p in patterns:  # suffix or regex, as in PEFT
        found = {n for n in linears if re.fullmatch(rf"(.*\.)?({p})", f"transformer.{n}")}
        if not found:
            raise ValueError(f"target {p} hits no linear layer of {', '.join(linears)}")
        hit |= found
    layers = {n: linears[n] for n in linears if n in hit}
    fast = {m for e in model.modules() if isinstance(e, nn.TransformerEncoderLayer)
            for m in e.modules()}  # read, not called
    weights = [p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False)]
    for n, m in layers.items():
        if type(m) not in (nn.Linear, LoRALinear):
            raise ValueError(f"target {n} is {type(m).__name__}, not nn.Linear")
        if m in fast or "forward" in vars(m) or "weight" not in m._parameters:
            raise ValueError(f"target {n}: its weight is not what nn.Linear reads")
        if weights.count(m.weight.data_ptr() or "meta") > 1:
            raise ValueError(f"target {n} shares its weight: untie it (tie_word_embeddings=False)")
    return layers

def _add(model, name, layers, config):
    if any(name in getattr(m, "configs", ()) for m in model.modules()):
        raise ValueError(f"adapter {name!r} is there already")
    for m in layers:
        if type(m) is nn.Linear:
            m.__class__ = LoRALinear  # in place: who holds it or its weight still does
            m.lora_A, m.lora_B, m.configs = nn.ParameterDict(), nn.ParameterDict(), {}
        r, dtype = config["r"], torch.promote_types(m.weight.dtype, torch.float32)
        m.lora_A[name] = m.weight.new_empty(r, m.in_features, dtype=dtype)
        m.lora_B[name] = m.weight.new_zeros(m.out_features, r, dtype=dtype)
        m.configs[name] = config
    use_lora(model, name)

def _holders(model, name):
    found = {n: m for n, m in model.named_modules() if name in getattr(m, "configs", ())}
    if not found:
        raise ValueError(f"no adapter {name!r}")
    return found

def add_lora(model, r=8, alpha=16, targets=("c_attn", "c_proj", "c_fc"), dropout=0.0,
             rslora=False, name="default"):
    """Add an adapter and make it active; untrained it changes nothing (B = 0). targets: suffixes
    of module names (attn.c_proj) or patterns with *. ValueError for one that hits nothing or
    cannot be adapted, a taken name, r below 1."""
    if r < 1:
        raise ValueError(f"r is {r}, not 1 or more")
    layers = _select(model, [re.escape(t).replace(r"\*", ".*") for t in targets]).values()
    config = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora}
    _add(model, name, layers, config)
    for layer in layers:
        nn.init.kaiming_uniform_(layer.lora_A[name], a=5**0.5)

def use_lora(model, name):
    """Activate an adapter, None (the base), or a list, one per row. ValueError: there is none."""
    for n in set(name if isinstance(name, list) else [name]) - {None}:
        _holders(model, n)
    for m in model.modules():
        if isinstance(m, LoRALinear):
            m.active = name

@torch.no_grad()
def merge_lora(model, name="default", weight=1.0):
    """W += weight s B A, summed in float64. Other adapters stay; a layer without any is nn.Linear
    again. ValueError for an unknown adapter."""
    for m in _holders(model, name).values():  # float64, CPU: no autocast, no TF32
        W, A, B = (t.cpu().double() for t in (m.weight, m.lora_A[name], m.lora_B[name]))
        m.weight.copy_(W + weight * m.scale(name) * B @ A)
        del m.lora_A[name], m.lora_B[name], m.configs[name]
        if not m.configs:
            del m.lora_A, m.lora_B, m.configs, m.active
            m.__class__ = nn.Linear

def lora_state_dict(model, name="default"):
    """The entries of model.state_dict() that are one adapter's."""
    return {f"{n}.{kind}.{name}": getattr(m, kind)[name].detach()
            for n, m in _holders(model, name).items() for kind in ("lora_A", "lora_B")}

# Options read below, or without effect; no other may be set.
KNOWN = """peft_type task_type base_model_name_or_path r lora_alpha lora_dropout target_modules
    use_rslora bias init_lora_weights fan_in_fan_out inference_mode auto_mapping peft_version
    megatron_core qalora_group_size""".split()
VALUES = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian"]}

def save_lora(model, folder, name="default", base="gpt2"):
    """Write an adapter as a PEFT folder. base: its model, a hub name or a folder."""
    from gpt import write_json, write_safetensors
    if Path(base, "config.json").is_file():
        base = Path(base).resolve()
    holders, tensors = _holders(model, name), {}
    for key, tensor in lora_state_dict(model, name).items():
        path = key if key.startswith("lm_head.") else f"transformer.{key}"
        tensors[f"base_model.model.{path.removesuffix(name)}weight"] = tensor
    write_safetensors(f"{folder}/adapter_model.safetensors", tensors)
    write_json(f"{folder}/adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "fan_in_fan_out": True,
        "base_model_name_or_path": str(base), "target_modules": list(holders),
        **next(iter(holders.values())).configs[name]})

def _read_adapter(folder):
    from gpt import read_json, read_safetensors
    inside = Path(folder, "adapter")  # of a run
    folder = inside if inside.is_dir() else Path(folder)
    config = read_json(folder / "adapter_config.json")
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        if not config.get(key):  # PEFT has silent defaults
            raise ValueError(f"{folder}: its config lacks {key}")
    for key, value in config.items():
        if value and (key not in KNOWN or value not in VALUES.get(key, [value])):
            raise ValueError(f"{folder}: {key} {value!r} is not supported")
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        raise FileNotFoundError(f"no {weights} (load adapter_model.bin with peft, save it again)")
    return config, read_safetensors(weights)

def load_lora(model, folder, name="default"):
    """Add a PEFT folder's adapter and make it active. ValueError, with nothing changed, for other
    options, layers that cannot be adapted, tensors that do not fit."""
    config, tensors = _read_adapter(folder)
    targets, shapes, r = config["target_modules"], {}, config["r"]
    if isinstance(targets, str):
        targets = [targets.replace("all-linear", ".*(?<!lm_head)")]
    layers = _select(model, targets)
    for n, m in layers.items():
        shapes[f"{n}.lora_A.{name}"] = (r, m.in_features)
        shapes[f"{n}.lora_B.{name}"] = (m.out_features, r)
    theirs = r"base_model\.model\.(transformer\.)?(.*\.)weight"
    tensors = {re.sub(theirs, rf"\g<2>{name}", key): t for key, t in tensors.items()}
    found = {key: t.shape if t.isfinite().all() else () for key, t in tensors.items()}
    if wrong := shapes.items() ^ found.items():
        raise ValueError(f"{folder}: {min(wrong)[0]} is missing, extra, misshapen or not finite")
    used = ("r", "lora_alpha", "lora_dropout", "use_rslora")
    _add(model, name, layers.values(), {key: config.get(key, 0) for key in used})
    model.load_state_dict(tensors, strict=False)

def run(args):
    """Show or merge."""
    if args.command == "show":
        print(*_read_adapter(args.folder)[0].items(), sep="\n")
        return
    from data import copy_tokenizer
    from gpt import GPT, model_folder, read_json
    if args.out.exists():
        raise ValueError(f"--out {args.out} is there already")
    source = model_folder(args.base)
    model = GPT.from_pretrained(source)
    for text in args.adapter:
        folder, _, weight = text.partition("=")
        base = Path(_read_adapter(folder)[0].get("base_model_name_or_path") or source)
        if (base / "config.json").is_file() and not base.samefile(source):
            raise ValueError(f"{folder} was trained on {base}: give that as --base")
        load_lora(model, folder)
        merge_lora(model, weight=float(weight or 1))
    eos_id = read_json(source / "config.json").get("eos_token_id", 50256)
    model.save_pretrained(args.out, eos_id=eos_id)
    copy_tokenizer(source, args.out)

def main(argv=None):
    quiet = {"usage": argparse.SUPPRESS}
    parser = argparse.ArgumentParser(**quiet)
    commands = parser.add_subparsers(dest="command", required=True, prog="lora.py")
    commands.add_parser("show", **quiet).add_argument("folder")
    merge = commands.add_parser("merge", **quiet)
    merge.add_argument("--base", required=True)
    merge.add_argument("--adapter", required=True, action="extend", nargs="+", metavar="F[=WEIGHT]")
    merge.add_argument("--out", required=True, type=Path)
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError, ImportError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 1
    return 0

if __name__ == "__main__":
    sys.exit(main())
