"""
Which backbones can be converted: every contract of tests/backbones on a toy model of every (task, model type) pair of the installed transformers.

    python benchmarks/backbones.py                 # two processes, five minutes; writes benchmarks/results/backbones.json and the page below
    python benchmarks/backbones.py --heads         # the same with every other key-value head linear; writes benchmarks/results/backbones_heads.json
    python benchmarks/backbones.py --again         # only the pairs that failed in the record, also with --heads
    python benchmarks/backbones.py --page          # the page alone, from the recorded results

Writes docs/reference/backbones.md. Exit status 1 if a contract fails.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import pathlib
import platform
import sys
import warnings


ROOT = pathlib.Path(__file__).parents[1]
HEADS = ROOT / "benchmarks/results/backbones_heads.json"
RESULTS, PAGE = ROOT / "benchmarks/results/backbones.json", ROOT / "docs/reference/backbones.md"
sys.path.insert(0, str(ROOT / "tests"))


def check_one(pair: tuple[str, str], every_other_head: bool = False) -> dict:
    import torch
    import transformers
    from backbones.contracts import check

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    return dataclasses.asdict(check(*pair, every_other_head))


def run(processes: int, every_other_head: bool = False, before: dict | None = None) -> dict:
    """Every pair, or those that failed `before`."""
    import torch
    import transformers
    from backbones.toy_models import pairs

    kept = {} if before is None else {(r["task"], r["model_type"]): r for r in before["rows"] if r["word"] != "fails"}
    todo = [pair for pair in pairs() if pair not in kept]
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        rows = []
        job = functools.partial(check_one, every_other_head=every_other_head)
        for row in pool.map(job, todo, chunksize=8):
            rows.append(row)
            print(f"\r{len(rows)} of {len(todo)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    rows = {**kept, **{(row["task"], row["model_type"]): row for row in rows}}
    return {"date": datetime.date.today().isoformat(), "versions": versions, "rows": [rows[pair] for pair in pairs()]}


def page(results: dict) -> str:
    """One row per model type: the worst word of its tasks."""
    from backbones.contracts import CONTRACTS

    by_type = collections.defaultdict(list)
    for row in results["rows"]:
        by_type[row["model_type"]].append(row)
    count = collections.Counter(word_of(rows) for rows in by_type.values())
    contracts = ", ".join(
        f"*{name}* ({contract.__doc__.split(chr(10))[0].rstrip('.').lower()})" for name, contract in CONTRACTS.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Backbones",
        "",
        f"Written by `python benchmarks/backbones.py` on {results['date']} ({versions}). Do not edit.",
        "",
        "A toy model of every model type, built from transformers' own config class, with **all** its attention sites linear (`linear_attention`).",
        f"Of {len(by_type)} model types with a class in an Auto mapping, **{count['works'] + count['loses']} work** ({count['loses']} of them lose",
        f"something that a linear layer cannot express), {count['refused']} are refused, and {count['harness']} could not be tried: the untouched toy",
        "model does not run here (packages that are not installed, or no working toy config).",
        "",
        f"A type *works* when every contract that its untouched model keeps is kept by the hybrid: {contracts}. A `-` in `benchmarks/results/backbones.json` says that a",
        "contract does not apply.",
        "",
        *heads_paragraph(),
        "| model type | tasks | verdict |",
        "|---|---|---|",
    ]
    for model_type in sorted(by_type):
        rows = by_type[model_type]
        tasks = ", ".join(row["task"] for row in rows)
        lines.append(f"| `{model_type}` | {tasks} | {verdict(rows)} |")
    missing = untried_types({row["model_type"] for row in results["rows"]})
    lines += [
        "",
        f"{len(missing)} more names are configs of parts, without a model class of their own in an Auto mapping; they are converted with the model around",
        f"them: {', '.join(f'`{name}`' for name in missing)}.",
        "",
    ]
    return "\n".join(lines)


def heads_paragraph() -> list[str]:
    """What the second sweep said, if it was run."""
    if not HEADS.exists():
        return []
    types = collections.defaultdict(list)
    for row in json.loads(HEADS.read_text())["rows"]:
        types[row["model_type"]].append(row)
    green = sum(word_of(rows) in ("works", "loses") for rows in types.values())
    whole = [
        name
        for name, rows in types.items()
        if any("cannot be taken out" in r["why"] or "after it cached" in r["why"] for r in rows)
    ]
    return [
        f"With every other key-value head of every layer linear and the others softmax (`--heads`), **{green}** types keep their contracts. Of these",
        f"families only whole layers can be converted: {', '.join(f'`{name}`' for name in sorted(whole))}.",
        "",
    ]


def untried_types(tried: set[str]) -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(set(CONFIG_MAPPING_NAMES) - tried)


def word_of(rows: list[dict]) -> str:
    order = ("fails", "harness", "refused", "loses", "works")
    return min((row["word"] for row in rows), key=order.index)


def verdict(rows: list[dict]) -> str:
    """`works`, `works, loses …`, `refused: …` or `not tried: …`; where tasks differ, the worst with its task."""
    word = word_of(rows)
    row = next(row for row in rows if row["word"] == word)
    kept = dict.fromkeys(why for one in rows for why in one["excluded"].values())
    beside = f"; layers that stay softmax: {'; '.join(kept)}" if kept and word in ("works", "loses") else ""
    where = f" (as {row['task']})" if len({one["word"] for one in rows}) > 1 else ""
    reason = row["why"].split("can replace: ")[-1].replace("|", "/").replace("\n", " ")
    return {
        "works": f"works{beside}",
        "loses": f"works, loses {' and '.join(row['lost'])}{beside}",
        "refused": f"refused{where}: {reason}",
        "harness": f"not tried{where}: {reason[:120]}",
        "fails": f"**fails**{where}: {reason}",
    }[word]


def every_other_head(processes: int, before: dict | None = None) -> int:
    """The second sweep: every other key-value head of every layer linear, the others softmax."""
    results = run(processes, every_other_head=True, before=before)
    HEADS.write_text(json.dumps(results, indent=0) + "\n")
    types = collections.defaultdict(list)
    for row in results["rows"]:
        types[row["model_type"]].append(row)
    green = sum(word_of(rows) in ("works", "loses") for rows in types.values())
    print(f"model types green with every other head linear: {green} of {len(types)} (bar 450)")
    for row in results["rows"]:
        if row["word"] == "fails":
            print(f"FAILS {row['task']} {row['model_type']}: {row['why']}")
    return 0 if green >= 450 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page from the recorded results")
    parser.add_argument("--again", action="store_true", help="only what failed in the record")
    parser.add_argument("--heads", action="store_true", help="every other key-value head linear")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.heads:
        return every_other_head(options.processes, json.loads(HEADS.read_text()) if options.again else None)
    if not options.page:
        results = run(options.processes, before=json.loads(RESULTS.read_text()) if options.again else None)
        RESULTS.write_text(json.dumps(results, indent=0) + "\n")
    results = json.loads(RESULTS.read_text())
    PAGE.write_text(page(results))
    words = collections.Counter(row["word"] for row in results["rows"])
    types = collections.defaultdict(set)
    for row in results["rows"]:
        types[row["model_type"]].add(row["word"])
    green = sum(words_of_type <= {"works", "loses"} for words_of_type in types.values())
    harness = sum("harness" in words_of_type for words_of_type in types.values())
    print(f"{len(results['rows'])} pairs: {dict(words)}")
    print(f"model types green: {green} of {len(types)} (bar 220); toy configs that do not run: {harness} (bar 30)")
    exact = [row for row in results["rows"] if "softmax inside" in row["contracts"]]
    ok = sum(row["contracts"]["softmax inside"] == "ok" for row in exact)
    print(f"softmax inside equal to the host: {ok} of {len(exact)} converted pairs (bar: all)")
    for row in results["rows"]:
        if row["word"] == "fails":
            print(f"FAILS {row['task']} {row['model_type']}: {row['why']}")
    return 1 if words["fails"] else 0


if __name__ == "__main__":
    sys.exit(main())
