"""
Multiple choice whose options change places. A converted model may answer "A" whatever is asked, and be right as often
as the dataset is; asked with its options turned round, it cannot hide.
"""

import string
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DatasetError


def permuted_choices(examples: Sequence[Mapping]) -> list[dict]:
    """
    Every question as often as it has options, the options turned by one place each time.

    Args:
        examples (`list[dict]`): `question` (`str`), `choices` (`list[str]`) and `answer` (`int`, the index).

    Returns:
        `list[dict]`: The same with `id` (of the example) and `shift`.
    """
    rows = []
    for number, example in enumerate(examples):
        choices, answer = list(example["choices"]), int(example["answer"])
        if not 2 <= len(choices) <= 26 or not 0 <= answer < len(choices):
            raise DatasetError(
                f"permuted_choices: example {number} must have 2 to 26 choices and the index of one of them; got "
                f"{len(choices)} and {answer}."
            )
        for shift in range(len(choices)):
            rows.append(
                {
                    "id": number,
                    "shift": shift,
                    "question": example["question"],
                    "choices": choices[shift:] + choices[:shift],
                    "answer": (answer - shift) % len(choices),
                }
            )
    return rows


@torch.no_grad()
def majority_of_permutations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Mapping]
) -> dict[str, float]:
    """
    Accuracy over all permutations, accuracy of those who answer right in every one, and how often each letter is said.

    Args:
        model (`PreTrainedModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer; letters are compared as single tokens after a space.
        examples (`list[dict]`): As of [`permuted_choices`].

    Returns:
        `dict[str, float]`: `accuracy`, `consistent_accuracy`, and `largest_letter_share`: 1 for a model that always
        says the same letter.
    """
    rows = permuted_choices(examples)
    model.eval()
    right: dict[int, list[bool]] = {}
    said: dict[str, int] = {}
    for row in rows:
        letters = string.ascii_uppercase[: len(row["choices"])]
        options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, row["choices"], strict=True))
        prompt = f"{row['question']}\n{options}Answer:"
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        tokens = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in letters]
        scores = model(input_ids=ids, use_cache=False)["logits"][0, -1, tokens]
        choice = int(scores.float().argmax())
        right.setdefault(row["id"], []).append(choice == row["answer"])
        said[letters[choice]] = said.get(letters[choice], 0) + 1
    answers = [value for values in right.values() for value in values]
    return {
        "accuracy": sum(answers) / len(answers),
        "consistent_accuracy": sum(all(values) for values in right.values()) / len(right),
        "largest_letter_share": max(said.values()) / len(rows),
    }


__all__ = ["majority_of_permutations", "permuted_choices"]
