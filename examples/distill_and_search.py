"""Make a sentiment hybrid of a causal language model, from labelled rows, in the shape of a training script.

    python examples/distill_and_search.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset rotten_tomatoes \
        --output_dir smollm2-sentiment --max_steps 100 --per_device_train_batch_size 4 --report_to none

One GPU: minutes; two CPU cores: about an hour at these sizes. Prints the layers replaced and the accuracy on the test split beside
the teacher's. `--train_file`, `--validation_file` and `--test_file` (JSON lines with `text` and `label`) take the place of `--dataset`.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoTokenizer, HfArgumentParser

from hf_hybrid import GreedyLayerSwapCallback, HybridTrainer, HybridTrainingArguments
from hf_hybrid.evaluation.label_words import LabelWordTask


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Name or path of the teacher."})
    dataset: str | None = field(default=None, metadata={"help": "Name of a dataset with text, label and three splits."})
    train_file: str | None = field(default=None, metadata={"help": "JSON lines."})
    validation_file: str | None = field(default=None, metadata={"help": "JSON lines."})
    test_file: str | None = field(default=None, metadata={"help": "JSON lines."})
    prompt: str = field(default="Review: {text}\nSentiment:", metadata={"help": "Prompt with {text}."})
    label_words: str = field(default=" negative, positive", metadata={"help": "Comma-separated, with leading spaces."})
    mixer: str = field(default="linear_attention", metadata={"help": "A registered mixer."})
    max_drop: str = field(default="0.02", metadata={"help": "Allowed loss of accuracy."})


def main():
    script, training = HfArgumentParser((ScriptArguments, HybridTrainingArguments)).parse_args_into_dataclasses()
    if script.dataset:
        data = load_dataset(script.dataset)
    else:
        files = {"train": script.train_file, "validation": script.validation_file, "test": script.test_file}
        data = load_dataset("json", data_files=files)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    task = LabelWordTask(tokenizer, script.prompt, script.label_words.split(","))
    half = len(data["validation"]) // 2
    selection, confirmation = data["validation"].select(range(half)), data["validation"].select(range(half, 2 * half))

    trainer = HybridTrainer(
        script.model,
        script.mixer,
        training,
        train_dataset=data["train"],
        eval_dataset=task.dataset(list(selection)),
        processing_class=tokenizer,
        callbacks=[
            GreedyLayerSwapCallback("accuracy", script.max_drop, confirmation_dataset=task.dataset(list(confirmation)))
        ],
        **task.trainer_kwargs(),
    )
    trainer.train()
    chosen, test = trainer.swap_report.confirmed, task.dataset(list(data["test"]))
    hybrid = trainer.evaluate(test)["eval_accuracy"]
    trainer.swap_layers([])
    teacher = trainer.evaluate(test)["eval_accuracy"]
    trainer.swap_layers(chosen)
    trainer.save_model()
    print(
        f"{len(chosen)} linear layers, test accuracy {hybrid:.3f} (teacher {teacher:.3f}); saved to {training.output_dir}"
    )


if __name__ == "__main__":
    main()
