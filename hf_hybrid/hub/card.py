"""The model card of a hybrid checkpoint: where it comes from, which layers are linear, what the search measured."""

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Protocol

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modelcard import TASK_MAPPING

from ..configuration_hybrid import package_version
from ..mixers import MixerConfig, build_mixer


CARD_FILE = "README.md"
# In every card this package writes. A card without it is somebody's own and is left alone.
MARKER = "<!-- written by hf_hybrid; remove this line to keep your edits -->"


class ReportedTrial(Protocol):
    """What the card reads of one evaluation of a search."""

    swapped: list[str]
    candidate: str | None
    metrics: dict[str, float]


class SearchReport(Protocol):
    """What the card reads of a search's report."""

    metric: str
    base: float
    floor: float
    commits: Sequence[ReportedTrial]
    trials: Sequence[ReportedTrial]
    confirmations: Sequence[ReportedTrial]


def is_own_card(path: str) -> bool:
    """Whether the file is a model card that somebody wrote by hand."""
    if not os.path.exists(path):
        return False
    with open(path, encoding="utf-8") as file:
        return MARKER not in file.read()


def number_of_layers(config) -> int:
    """
    Layers of the whole model as its config counts them: of an encoder-decoder both, of a multimodal model all towers; 0
    if it does not say.
    """
    parts = [getattr(config, key, None) for key in type(config).sub_configs]
    towers = [number_of_layers(part) for part in parts if isinstance(part, PreTrainedConfig)]
    if any(towers):
        return sum(towers)
    own = getattr(config, "num_hidden_layers", None) or getattr(config, "encoder_layers", None) or 0
    decoder = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None)
    return int(own) + (int(decoder or own) if getattr(config, "is_encoder_decoder", False) else 0)


def write_model_card(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    report: SearchReport | None = None,
    repo_id: str | None = None,
    extra: str = "",
) -> str:
    """
    Write `README.md` for a hybrid model. The licence is taken from the base model's card if that is on this machine.

    Args:
        model (`PreTrainedModel`): The hybrid.
        folder (`str`): Where to.
        report (`SwapReport`, *optional*): Adds the search's table, and its values for these layers to the metadata.
        repo_id (`str`, *optional*): Name in the usage example; defaults to the folder's.
        extra (`str`, *optional*): More Markdown, put before the limits.

    Returns:
        `str`: The path of the card.
    """
    config, rows = model.config, site_rows(model.config)
    base = config.hybrid["base_model"]
    title = repo_id or os.path.basename(os.path.abspath(folder))
    results = [] if report is None else _eval_results(report, _task(model), rows)
    data = ModelCardData(
        library_name="transformers",
        # a local path means nothing to readers
        base_model=None if _is_local(base["name_or_path"]) else base["name_or_path"],
        tags=["hf_hybrid", "hybrid-attention", "linear-attention"],
        pipeline_tag=_task(model),
        eval_results=results or None,
        model_name=title if results else None,
        **licence_of([(config.name_or_path, None), (base["name_or_path"], base["revision"])]),
    )
    auto = next((name for name in model.hybrid_auto_map() if name not in ("AutoConfig", "AutoModel")), "AutoModel")
    with resources.as_file(resources.files(__package__) / "templates" / "model_card.md") as template:
        card = ModelCard.from_template(
            data,
            template_path=str(template),
            title=title,
            repo_id=title,
            base_model=data.base_model,
            base_model_type=type(config).model_type,
            version=package_version(),
            auto_class=auto,
            linear=len(rows),
            total=max(number_of_layers(config), len(rows)),
            mixers=", ".join(f"`{mixer}`" for mixer in sorted({row["mixer"] for row in rows})) or "none",
            rows=rows,
            repaired=bool(config.hybrid.get("repair")),
            report=report,
            extra=extra,
            marker=MARKER,
        )
    path = os.path.join(folder, CARD_FILE)
    card.save(path + ".tmp")
    os.replace(path + ".tmp", path)
    return path


def site_rows(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """What the card says of every linear layer of a hybrid's config, in the order of the model."""
    rows = []
    for name, linear in config.linear_sites().items():
        mixer = build_mixer(MixerConfig.from_dict(linear.mixer), **linear.site.sizes(), heads=linear.heads)
        whole = len(linear.heads) == linear.site.num_key_value_heads
        rows.append(
            {
                "name": name,
                "mixer": linear.mixer["name"],
                "heads": linear.site.num_heads,
                "linear_heads": "all" if whole else ", ".join(map(str, linear.heads)),
                "bytes": f"{mixer.state_bytes():,}",
            }
        )
    return rows


def licence_of(sources: Sequence[tuple[str | None, str | None]]) -> dict[str, str]:
    """
    The licence entries (`license`, `license_name`, `license_link`) of the first card that has one.

    Args:
        sources (`list[tuple[str, str]]`): Folders, or names on the Hub and revisions. Only what is on this machine is
            read: a save must not wait for a network.
    """
    for name, revision in sources:
        if not name:
            continue
        try:
            local = os.path.join(name, CARD_FILE) if _is_local(name) else None
            path = local or try_to_load_from_cache(name, CARD_FILE, revision=revision)
            if not isinstance(path, str) or not os.path.isfile(path):
                continue
            data = ModelCard.load(path, ignore_metadata_errors=True).data
        except (ValueError, yaml.YAMLError):  # a card with a broken header says nothing, nor does a folder that is gone
            continue
        if data.license:
            entries = {key: data.get(key) for key in ("license", "license_name", "license_link")}
            return {key: value for key, value in entries.items() if value}
    return {}


def _is_local(name: str | None) -> bool:
    return bool(name) and (os.path.isabs(name) or os.path.isdir(name))


def _task(model: PreTrainedModel) -> str | None:
    """The Hub's name of what the base model's class is for; of several (a model of text that also sees), the last."""
    names = {cls.__name__ for cls in type(model).__mro__}
    tasks = [task for task, mapping in TASK_MAPPING.items() if names & _class_names(mapping)]
    return tasks[-1] if tasks else None


def _class_names(mapping: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    return {name for names in mapping.values() for name in ((names,) if isinstance(names, str) else names)}


def _eval_results(report: SearchReport, task: str | None, rows: list[dict]) -> list[EvalResult]:
    """The search's metric with exactly these layers linear, on the split it chose by and on the confirming one."""
    # the Hub wants a task; a model class without one has no place in its tables
    if task is None or any(row["linear_heads"] != "all" for row in rows):
        return []
    linear, results = {row["name"] for row in rows}, []
    for split, trials in (("validation", report.trials), ("confirmation", report.confirmations)):
        trial = next((trial for trial in trials if set(trial.swapped) == linear), None)
        if trial is not None:
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type="custom",
                    dataset_name=f"{split} data of the search",
                    dataset_split=split,
                    metric_type=report.metric.removeprefix("eval_"),
                    metric_value=trial.metrics[report.metric],
                )
            )
    return results
