"""What a trial's outcome depends on beside the layers that were linear: two searches that agree in it share a trace.

What trials do not depend on (the metric that is watched, its direction and floor, the batch size) is not in it.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from accelerate.utils import align_module_device
from datasets import Dataset, IterableDataset
from datasets.table import embed_table_storage
from torch import nn

from .fingerprint import Fingerprint
from .ranks import from_rank_zero, gathered


# the Trainer's hooks into an evaluation, and those of its arguments that change what it returns
FUNCTIONS = ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics", "data_collator")
ARGUMENTS = ("label_smoothing_factor", "label_names", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval")
# entries of a config that say nothing about a forward, or that training and swapping change
PASSING = ("_name_or_path", "architectures", "auto_map", "dtype", "hybrid", "transformers_version", "use_cache")
ROWS_AT_ONCE = 1000


def search_identity(trainer) -> dict[str, Any]:
    """
    The identity of a search for [`SwapTrace`], as rank 0 sees it. A collective.

    Args:
        trainer ([`HybridTrainer`]): With its model, validation data and metric function.

    Raises:
        DatasetError: If validation rows hold objects that show nothing of their content.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    shards = gathered(weights_digest(model))  # equal on all processes, unless each holds a part of its own
    weights = shards[0] if len(set(shards)) == 1 else Fingerprint().add(shards).hexdigest()

    def describe() -> dict[str, Any]:
        functions = {name: getattr(trainer, name, None) for name in FUNCTIONS}
        arguments = {name: getattr(trainer.args, name, None) for name in ARGUMENTS}
        if trainer.args.dataloader_drop_last:  # only then the batch size says which rows are seen
            arguments["batch_size"] = trainer.args.eval_batch_size
        return {
            "sites": list(trainer.distill_sites),
            "mixers": {name: layer.hybrid_config.to_dict() for name, layer in trainer.distill_sites.items()},
            "weights": weights,
            "config": Fingerprint().add(_lasting(model.config.to_dict())).hexdigest(),
            "data": data_digest(trainer.eval_dataset),
            "arguments": arguments,
            "trainer": Fingerprint().add(type(trainer)).hexdigest(),  # a subclass may evaluate in its own way
            **{name: function and Fingerprint().add(function).hexdigest() for name, function in functions.items()},
        }

    return from_rank_zero(describe)


def weights_digest(model: nn.Module) -> str:
    """Digest of all parameters and buffers, offloaded ones included. A collective where weights are sharded."""
    digest = Fingerprint()
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # tied weights under one name
    for prefix, module in model.named_modules():
        with align_module_device(module):
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                path = f"{prefix}.{name}".strip(".")
                if path in once:
                    digest.add(path)
                    digest.add_tensor(tensor)
    return digest.hexdigest()


def data_digest(dataset) -> str | dict[str, str]:
    """
    Digest of all rows, by split where there are several. Rows of a `datasets.Dataset` are read as they are stored,
    whatever format is set, and with what is set to transform them; those of other datasets as they are returned.
    """
    if isinstance(dataset, Mapping):
        return {name: str(data_digest(part)) for name, part in dataset.items()}
    digest = Fingerprint(strict=True)
    if isinstance(dataset, Dataset):
        digest.add(dataset.format["format_kwargs"].get("transform"))
        for chunk in _stored_chunks(dataset):
            digest.add(chunk)
        return digest.hexdigest()
    if isinstance(dataset, IterableDataset) and dataset.features is not None:
        dataset = dataset.decode(False)  # pictures and sounds as bytes
    for row in dataset if isinstance(dataset, Iterable) else map(dataset.__getitem__, range(len(dataset))):
        digest.add(row)
    return digest.hexdigest()


def _stored_chunks(dataset: Dataset):
    """The visible columns as JSON, some rows at a time; files that rows refer to are read."""
    columns = sorted(dataset.format["columns"])
    stored = dataset.with_format("arrow", columns=columns)
    for start in range(0, len(stored), ROWS_AT_ONCE):
        table = embed_table_storage(stored[start : start + ROWS_AT_ONCE])
        for name in columns:
            yield name
            yield json.dumps(table[name].to_pylist(), default=lambda value: Fingerprint().add(value).hexdigest())


def _lasting(config: Any) -> Any:
    """A config without the entries in `PASSING` and the special tokens, which the Trainer aligns with a tokenizer."""
    if isinstance(config, Mapping):
        return {
            key: _lasting(value)
            for key, value in config.items()
            if key not in PASSING and not str(key).endswith("_token_id")
        }
    return config
