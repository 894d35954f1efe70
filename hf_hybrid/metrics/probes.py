"""
Rows that ask for something said before. Each has `input_ids` and `labels`; labels are -100 but where the answer stands,
so that the loss of a row is the loss of its answer: for `Trainer.evaluate` as for [`row_losses`].
"""

import random
from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import DatasetError


NAMES = ["Alice", "Boris", "Carla", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Karin", "Luis"]
HIDDEN = -100


def repeated_passages(input_ids: torch.Tensor, length: int, between: int = 0) -> Dataset:
    """
    A passage read twice; what is asked for is the second reading.

    Args:
        input_ids (`torch.Tensor`): Text, `[N, T]`, with `T` at least `length + between`.
        length (`int`): Tokens of the passage: the first of each row.
        between (`int`, *optional*, defaults to 0): Tokens of the row that stand between the two readings.

    Returns:
        `Dataset`: `N` rows of `2 * length + between` tokens. The first token of the second reading is not asked for.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < length + between or length < 2:
        raise DatasetError(
            f"repeated_passages: input_ids must be [N, T] with T of length + between = {length + between} or more; got "
            f"{list(input_ids.shape)}."
        )
    rows = []
    for row in input_ids.tolist():
        passage = row[:length]
        ids = row[: length + between] + passage
        rows.append({"input_ids": ids, "labels": [HIDDEN] * (length + between + 1) + passage[1:]})
    return Dataset.from_list(rows)


def needles(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int = 8,
    num_needles: int = 6,
    seed: int = 1,
) -> Dataset:
    """
    "The secret code of Elena is 48213." and its like, hidden in texts; the code of one of them is asked for at the end.

    Args:
        texts (`list[str]`): Each long enough; taken in turn.
        tokenizer (`PreTrainedTokenizerBase`): Of the model.
        length (`int`): Tokens per row, about.
        count (`int`, *optional*, defaults to 8): Rows.
        num_needles (`int`, *optional*, defaults to 6): Codes per row, at most 12.
        seed (`int`, *optional*, defaults to 1): Of names, codes and places.

    Returns:
        `Dataset`: `count` rows; what is asked for are the digits of the code.
    """
    rng, rows = random.Random(seed), []
    if not 1 <= num_needles <= len(NAMES):
        raise DatasetError(f"needles: num_needles must be in 1..{len(NAMES)}; got {num_needles}.")
    for number in range(count):
        room = length - 40 - 20 * num_needles
        body = _tokens(tokenizer, texts[number % len(texts)])
        if len(body) < room or room < 100:
            raise DatasetError(
                f"needles: each text must have at least {max(room, 100)} tokens; got {len(body)}. Pass longer texts, "
                "or another length."
            )
        body = body[:room]
        names = rng.sample(NAMES, num_needles)
        codes = [str(rng.randint(10000, 99999)) for _ in range(num_needles)]
        cuts = sorted(rng.sample(range(50, len(body) - 50), num_needles), reverse=True)
        for name, code, cut in zip(names, codes, cuts, strict=True):
            body = body[:cut] + _tokens(tokenizer, f" The secret code of {name} is {code}.") + body[cut:]
        asked = rng.randrange(num_needles)
        question = f"\nThe secret code of {names[asked]} is"
        rows.append(_asked(body, question, f" {codes[asked]}", tokenizer))
    return Dataset.from_list(rows)


def key_value_lookup(
    tokenizer: PreTrainedTokenizerBase, num_pairs: int, count: int = 16, seed: int = 1, digits: int = 5
) -> Dataset:
    """
    A list of keys and values, "k3817: 90412"; the value of one key is asked for at the end.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of the model.
        num_pairs (`int`): Lines per row.
        count (`int`, *optional*, defaults to 16): Rows.
        seed (`int`, *optional*, defaults to 1): Of keys and values.
        digits (`int`, *optional*, defaults to 5): Of a value.
    """
    rng, rows = random.Random(seed), []
    if not 1 <= num_pairs <= 9000:
        raise DatasetError(f"key_value_lookup: num_pairs must be in 1..9000; got {num_pairs}.")
    for _ in range(count):
        keys = [f"k{number}" for number in rng.sample(range(1000, 10000), num_pairs)]
        values = [str(rng.randint(10 ** (digits - 1), 10**digits - 1)) for _ in keys]
        lines = "".join(f"{key}: {value}\n" for key, value in zip(keys, values, strict=True))
        asked = rng.randrange(num_pairs)
        rows.append(_asked(_tokens(tokenizer, lines), f"{keys[asked]}:", f" {values[asked]}", tokenizer))
    return Dataset.from_list(rows)


def _asked(body: list[int], question: str, answer: str, tokenizer) -> dict:
    """A row that ends with a question and its answer. They are tokenised together, and cut where their text is."""
    asked, both = _tokens(tokenizer, question), _tokens(tokenizer, question + answer)
    if both[: len(asked)] != asked:  # a tokenizer that joins the two at the seam
        both = asked + _tokens(tokenizer, answer)
    ids = body + both
    first = len(body) + len(asked)
    return {"input_ids": ids, "labels": [HIDDEN] * first + ids[first:]}


def _tokens(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


__all__ = ["key_value_lookup", "needles", "repeated_passages"]
