"""Writes the measured tables of docs/mixers/*.md and docs/explanation/cpu_speed.md from benchmarks/results, between their markers.

python benchmarks/cards.py           # after benchmarks/ops.py --json and benchmarks/mixers.py --output
python benchmarks/cards.py --check   # exit status 1 if a page is out of date
"""

import argparse
import json
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- measured -->\n", "<!-- /measured -->\n"
# card: rows of benchmarks/ops.py, rows of benchmarks/mixers.py
CARDS = {
    "linear_attention": (
        ["linear_attention/hedgehog", "linear_attention/hedgehog+window", "linear_attention/taylor", "linear_attention/dpfp",
         "linear_attention/softmax", "linear_attention/elu", "linear_attention/relu"],
        ["linear_attention"],
    ),
    "sliding_window": (["sliding_window"], ["sliding_window"]),
    "lightning": (["lightning", "lightning/equal_heads"], ["lightning"]),
    "gla": (["gla", "gla/safe"], ["gla"]),
    "gated_delta_net": (
        ["gated_delta_net", "gated_delta_net/equal_heads"], ["gated_delta_net"],
    ),
    "kimi_delta": (["kimi_delta"], ["kimi_delta"]),
    "jet_block": (["gated_delta_net"], ["jet_block"]),
    "identity": ([], ["identity"]),
}  # fmt: skip


def load(name):
    return json.loads((RESULTS / name).read_text())


def speed_table(ops, names):
    rows = ops["rows"]

    def ratio(op, phase, dtype, length):
        for row in rows:
            if (row["op"], row["phase"], row["dtype"], row["length"]) == (op, phase, dtype, length):
                return f"{row['speedup_vs_sdpa']:.1f}x"
        return "-"

    def crossover(op):
        found = [
            row["length"]
            for row in rows
            if row["op"] == op and row["phase"] == "crossover" and row["dtype"] == "float32"
        ]
        return str(found[0]) if found and found[0] else "-"

    lines = [
        "| times as fast as torch's softmax attention | prefill of 4,096, fp32 | bf16 | forward and backward of 4,096, fp32 | a token after 8,192, fp32 | bf16 | never slower from, tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for op in names:
        cells = [ratio(op, "prefill", dtype, 4096) for dtype in ("float32", "bfloat16")]
        cells += [ratio(op, "train", "float32", 4096)]
        cells += [ratio(op, "decode", dtype, 8192) for dtype in ("float32", "bfloat16")]
        lines.append(f"| `{op}` | {' | '.join(cells)} | {crossover(op)} |")
    return lines


def quality_table(mixers, names):
    rows = {(row["mixer"], row["layers"]): row for row in mixers["rows"]}
    teacher = rows["teacher", "none"]
    lines = [
        f"| SmolLM2-135M (teacher: {teacher['perplexity']:.2f}, {teacher['recall_loss']:.2f} nats) | perplexity, 15 odd layers | all 30 | recall of a repeated passage, nats: 15 | all 30 | share of the state |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        odd, every = rows[name, "odd"], rows[name, "all"]
        share = f"{odd['state_share']:.1%}" if "state_share" in odd else "-"
        lines.append(
            f"| `{name}` | {odd['ratio']:.3f}x | {every['ratio']:.3f}x | {odd['recall_loss']:.2f} | {every['recall_loss']:.2f} | {share} |"
        )
    return lines


def card(ops, mixers, speeds, qualities):
    machine = ops["machine"]
    lines = []
    if speeds:
        lines += [
            f"**Measured** on one thread of {machine['processor']}{', with AMX' if machine['amx'] else ''}, torch {machine['torch']}, {machine['ops']} kernels "
            "(`python benchmarks/ops.py`; 9 query heads, 3 key-value heads of 64):",
            "", *speed_table(ops, speeds), "",
        ]  # fmt: skip
    lines += [
        f"**Quality** after {mixers['tokens'] // 1000}k tokens of distillation (`python benchmarks/mixers.py`; held-out State of the Union, 1,024 tokens):",
        "", *quality_table(mixers, qualities), "",
    ]  # fmt: skip
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page would change")
    options = parser.parse_args()
    ops, mixers = load("ops.json"), load("mixers.json")
    pages = {ROOT / "docs" / "mixers" / f"{name}.md": card(ops, mixers, *rows) for name, rows in CARDS.items()}
    everything = [op for speeds, _ in CARDS.values() for op in speeds]
    pages[ROOT / "docs" / "explanation" / "cpu_speed.md"] = [*speed_table(ops, list(dict.fromkeys(everything))), ""]
    pages[ROOT / "docs" / "how_to" / "choose_a_mixer.md"] = [
        *quality_table(mixers, list(dict.fromkeys(row["mixer"] for row in mixers["rows"] if row["layers"] == "odd"))), "",
    ]  # fmt: skip
    stale = []
    for page, lines in pages.items():
        text = page.read_text()
        before, start, rest = text.partition(START)
        _, end, after = rest.partition(END)
        if not (start and end):
            raise SystemExit(f"{page}: the markers {START.strip()} … {END.strip()} are missing")
        new = before + START + "\n".join(lines) + END + after
        if new != text:
            stale.append(page.relative_to(ROOT))
            if not options.check:
                page.write_text(new)
    print(
        "up to date" if not stale else ("out of date: " if options.check else "written: ") + ", ".join(map(str, stale))
    )
    sys.exit(bool(stale) and options.check)


if __name__ == "__main__":
    main()
