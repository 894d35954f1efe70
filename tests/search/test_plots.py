"""The pictures of a search."""

from hf_hybrid.search.greedy import greedy_swap
from hf_hybrid.search.plots import plot_layer_map, plot_trade_off


def test_a_search_without_a_floor_has_a_picture(tmp_path, recwarn):
    report = greedy_swap(
        ["a:0", "a:1"], lambda swapped: {"eval_loss": 1.0 + len(swapped)}, metric="eval_loss",
        greater_is_better=False, max_drop=None,
    )  # fmt: skip
    assert report.to_dict()["floor"] is None and len(report.most_linear) == 2
    plot_trade_off(report, tmp_path / "trade_off.png")
    assert (tmp_path / "trade_off.png").stat().st_size > 2000 and not recwarn.list


def test_pictures_are_written(tmp_path):
    sites = ["a", "b", "c"]
    report = greedy_swap(
        sites,
        lambda swapped: {"eval_accuracy": 0.9 - 0.01 * len(swapped)},
        metric="eval_accuracy",
        greater_is_better=True,
        max_drop=0.02,
    )
    plot_trade_off(report, tmp_path / "trade_off.png")
    plot_layer_map(sites, report.most_linear, tmp_path / "layer_map.png")
    for name in ("trade_off.png", "layer_map.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 2000
