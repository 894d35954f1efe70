"""The trainer's switch: which layers and heads are linear, set by hand or by a search."""

from ..errors import HybridConfigError
from ..search.callback import GreedyLayerSwapCallback
from ..search.greedy import SwapReport
from ..surgery import linear_heads, set_linear_heads_


class Swaps:
    """Put in front of the Trainer."""

    def swap_layers(self, layers, heads: dict | None = None) -> None:
        """
        Make exactly these layers linear; the others keep their softmax.

        Args:
            layers: Names, or indices among the layers that have a mixer; `None` for those that `heads` names.
            heads (`dict`, *optional*): Key-value heads by layer; layers that it does not name become linear whole.

        Raises:
            HybridConfigError: If a layer or head has no mixer.
        """
        layers = [layers] if isinstance(layers, int | str) else layers
        names = list(self.distill_sites)
        in_range = range(-len(names), len(names))

        def name_of(layer):
            name = names[layer] if isinstance(layer, int) and layer in in_range else layer
            if name not in names:
                raise HybridConfigError(f"swap_layers: {name!r} has no student. Sites: {names[0]} … {names[-1]}.")
            return name

        some = {name_of(layer): chosen for layer, chosen in (heads or {}).items()}
        if len(some) < len(heads or {}):
            raise HybridConfigError(f"swap_layers: heads name a layer twice; got {heads!r}. Name each layer once.")
        wanted = some if layers is None else {name: some.get(name) for name in map(name_of, layers)}
        extra = [name for name in some if name not in wanted]
        if extra:
            raise HybridConfigError(
                f"swap_layers: heads are given for {extra[0]!r}, which is not among the layers. Add it."
            )
        set_linear_heads_(self.unwrapped, wanted)

    def swapped_layers(self) -> list[str]:
        """Names of the layers of which some heads are linear now."""
        return list(linear_heads(self.unwrapped))

    def search(
        self, metric: str = "eval_loss", max_drop: float | str | None = 0.02, *, strategy: str = "race", **kwargs
    ) -> SwapReport:
        """
        Search now for the layers or heads to make linear, with the mixers as they are; `train` is not needed for this.
        The model ends up with what was found, and `swap_report` says how.

        Args:
            metric (`str`, *optional*, defaults to `"eval_loss"`), max_drop (`float` or `str`, *optional*): What to
                watch on `eval_dataset`, and how much worse it may get.
            strategy (`str`, *optional*, defaults to `"race"`): How to look.
            kwargs: Everything else [`GreedyLayerSwapCallback`] takes, by the same names.

        Returns:
            [`SwapReport`]
        """
        return GreedyLayerSwapCallback(metric, max_drop, strategy=strategy, **kwargs).search(self)

    def add_callback(self, callback):
        super().add_callback(callback)
        self._link_callbacks()

    def _load_callback_state(self):
        data = {
            type(c): c.confirmation_dataset
            for c in self.callback_handler.callbacks
            if hasattr(c, "confirmation_dataset")
        }
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:  # restored from settings; data is not among them
            if type(callback) in data and callback.confirmation_dataset is None:
                callback.confirmation_dataset = data[type(callback)]
        self._link_callbacks()

    def _link_callbacks(self):
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "set_trainer"):
                callback.set_trainer(self)
