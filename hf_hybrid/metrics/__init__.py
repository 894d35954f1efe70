"""
What a hybrid loses, measured: rows that ask for recall (`probes`), multiple choice whose options change places
(`choices`), and the loss on what they ask for as a metric (`row_losses`).
"""

from .choices import majority_of_permutations, permuted_choices
from .probes import key_value_lookup, needles, repeated_passages
from .row_losses import RowLosses, row_losses


__all__ = [
    "RowLosses",
    "key_value_lookup",
    "majority_of_permutations",
    "needles",
    "permuted_choices",
    "repeated_passages",
    "row_losses",
]
