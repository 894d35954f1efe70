"""Which attention sites, and which of their key-value heads, a user has selected."""

from collections.abc import Mapping

from ..configuration_hybrid import AttentionSite
from ..errors import HybridConfigError, NoMatchingAttentionError, closest
from .layer import check_heads


def check_selection(layers, sites: list[AttentionSite], where: str) -> list[AttentionSite]:
    """
    The sites that `layers` selects: `None` for all, an iterable of indices and names, or a predicate on
    [`AttentionSite`]. A name is that of a site, of a module around sites (`"model.vision_tower"`), or of a part
    (`"encoder"`, `"decoder"`, `"text"`, `"vision"`, `"audio"`).

    Raises:
        HybridConfigError: If an index is out of range or a name is not a site.
        NoMatchingAttentionError: If nothing is selected.
    """
    if layers is None or layers == "all":
        chosen = list(sites)
    elif callable(layers):
        chosen = [site for site in sites if layers(site)]
    else:
        by_name, chosen = {site.name: site for site in sites}, []
        if isinstance(layers, (str, int)):
            layers = [layers]
        for layer in layers:
            if isinstance(layer, int):
                if not -len(sites) <= layer < len(sites):
                    raise HybridConfigError(
                        f"layers: index must be in 0..{len(sites) - 1} for the {len(sites)} attention sites of "
                        f"{where}; got {layer}."
                    )
                selected = [sites[layer]]
            elif layer in by_name:
                selected = [by_name[layer]]
            else:
                selected = [site for site in sites if site.part == layer or site.name.startswith(f"{layer}.")]
            if not selected:
                parts = sorted({site.part for site in sites if site.part})
                raise HybridConfigError(
                    f"layers: {layer!r} is not an attention site of {where}, nor around one, nor one of its parts "
                    f"({', '.join(parts)}).{closest(str(layer), [*by_name, *parts])} Use find_attention_sites(model) "
                    "to see them."
                )
            chosen.extend(site for site in selected if site not in chosen)
    if not chosen:
        raise NoMatchingAttentionError(
            f"layers={layers!r} matched none of the {len(sites)} attention sites of {where}. "
            "Use find_attention_sites(model) to see them."
        )
    return chosen


def select_heads(
    layers, heads: Mapping | None, sites: list[AttentionSite], where: str
) -> dict[str, tuple[AttentionSite, tuple[int, ...]]]:
    """
    The sites that `layers` selects and the key-value heads of each, by name: those that `heads` names, all of them
    where it does not. Without `layers`, the layers that `heads` names.

    Raises:
        HybridConfigError: If a layer or a head does not exist, is named twice, or heads are given for a layer that is
            not selected.
        NoMatchingAttentionError: If nothing is selected.
    """
    if heads is None:
        return {site.name: (site, _all(site)) for site in check_selection(layers, sites, where)}
    if not isinstance(heads, Mapping):
        raise HybridConfigError(
            f'heads must be a dict of key-value heads by layer, such as {{"{sites[0].name}": [0]}}; got {heads!r}.'
        )
    chosen = check_selection(list(heads) if layers is None else layers, sites, where)
    selected = {site.name: (site, _all(site)) for site in chosen}
    named: set[str] = set()
    for layer, wanted in heads.items():
        for site in check_selection([layer], sites, where):
            if site.name not in selected:
                raise HybridConfigError(
                    f"heads: {site.name} of {where} is not among the selected layers. Add it to `layers`, or leave "
                    "`layers` out."
                )
            if site.name in named:
                raise HybridConfigError(f"heads: {site.name} of {where} is named twice. Name each layer once.")
            named.add(site.name)
            checked = check_heads(_listed(wanted, site), _all(site), f"heads of {site.name}")
            if not checked:
                raise HybridConfigError(
                    f"heads: {site.name} of {where} has no heads. Leave the layer out, or name some."
                )
            selected[site.name] = site, checked
    return selected


def _all(site: AttentionSite) -> tuple[int, ...]:
    return tuple(range(site.num_key_value_heads))


def _listed(wanted, site: AttentionSite) -> list:
    if isinstance(wanted, int):
        return [wanted]
    if isinstance(wanted, str) or not hasattr(wanted, "__iter__"):
        raise HybridConfigError(f"heads of {site.name} must be a list of key-value heads; got {wanted!r}.")
    return list(wanted)


__all__ = ["check_selection", "select_heads"]
