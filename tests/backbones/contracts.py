"""What "works" means for a backbone: the contracts, over any (task, model type) pair. Nothing here knows a family.

A contract that the untouched model does not keep itself (padding in a model that ignores masks, generation in one that cannot) does not apply.
"""

import contextlib
import copy
import dataclasses
import inspect
import itertools
import tempfile
import warnings
from collections.abc import Callable

import torch
from transformers import AutoConfig, DynamicCache
from transformers.models.auto import modeling_auto

from hf_hybrid import convert_to_hybrid, restore_full_attention
from hf_hybrid.conversion.layer import hybrid_layers, is_hybrid_attention
from hf_hybrid.conversion.masks.padding import PICTURE_BLOCKS
from hf_hybrid.conversion.probe import ProbedModel, probe_attention
from hf_hybrid.errors import UnsupportedModelError
from hf_hybrid.modeling_hybrid import AUTO_CLASSES
from hf_hybrid.surgery import discard_students_, prepare_distillation_

from .pictures import picture_inputs
from .toy_configs import IMAGE_TOKEN, toy_config
from .toy_inputs import INPUTS
from .toy_models import ToyConfigError, harness_errors, model_class, toy_inputs, toy_model


# Random fp32 hosts with weights scaled by 4 amplify rounding: 1e-4 of the largest output.
TOLERANCE = 1e-4
# Our softmax inside the interception runs the host's own function on the host's own tensors: equal but for reordered sums.
EXACT = 1e-6
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class DoesNotApply(Exception):
    """The untouched model does not do this either."""


@dataclasses.dataclass
class Row:
    """What the contracts said about one (task, model type) pair."""

    task: str
    model_type: str
    model: str = ""
    word: str = ""  # works | loses | refused | fails | harness
    why: str = ""
    sites: int = 0
    excluded: dict[str, str] = dataclasses.field(default_factory=dict)
    lost: tuple[str, ...] = ()
    contracts: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # name: "ok", "-" (does not apply) or what went wrong


class Backbone:
    """A toy model with its inputs, and what was measured on it before anything was touched."""

    def __init__(self, task: str, model_type: str, every_other_head: bool = False):
        self.task, self.model_type, self.every_other_head = task, model_type, every_other_head
        self.model = toy_model(task, model_type)
        self._inputs = toy_inputs(self.model, model_type)
        # our own guesses where they do: what a user gets who passes no example_inputs
        self.example_inputs = self.inputs if model_type in INPUTS else None
        self.picture_inputs = picture_inputs(self.model, model_type)
        self.parameters = inspect.signature(self.model.forward).parameters
        self.keys, self.original = list(self.model.state_dict()), (type(self.model), type(self.model.config))
        self.host = {name: self._measure(function) for name, function in MEASUREMENTS.items()}

    @property
    def inputs(self) -> dict:
        """Arguments of one forward; made anew where they are no tensors but something that a forward uses up."""
        if all(value is None or isinstance(value, (torch.Tensor, dict)) for value in self._inputs.values()):
            return self._inputs
        return toy_inputs(self.model, self.model_type)

    def _measure(self, function: Callable):
        """What the model does, or `None` if it does not do that (whatever it raises)."""
        try:
            return function(self)
        except Exception:
            return None

    def keeps(self, name: str) -> bool:
        """Whether the untouched model keeps a contract that is a number."""
        return self.host[name] is not None and self.host[name] <= TOLERANCE

    def output(self, **inputs) -> torch.Tensor:
        torch.manual_seed(0)  # some hosts draw random numbers in evaluation too
        with torch.no_grad():
            return first_output(self.model(**inputs))

    @contextlib.contextmanager
    def softmax(self):
        """Every converted layer runs the host's softmax inside our interception."""
        layers = [module for module in self.model.modules() if is_hybrid_attention(module)]
        for layer in layers:
            layer.linear_heads = ()
        try:
            yield
        finally:
            for layer in layers:
                layer.linear_heads = layer.hybrid.heads


def first_output(outputs) -> torch.Tensor:
    """The tensor that a model is for."""
    if not hasattr(outputs, "items"):
        outputs = {str(i): value for i, value in enumerate(outputs if isinstance(outputs, tuple) else (outputs,))}
    for name in ("logits", "logits_per_image", "last_hidden_state", "prediction_logits"):
        if torch.is_tensor(outputs.get(name)):
            return outputs[name]
    return next(value for value in flat(outputs.values()) if torch.is_tensor(value) and value.is_floating_point())


def flat(values):
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from flat(value)
        elif hasattr(value, "items"):
            yield from flat(value.values())
        else:
            yield value


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())  # hosts mask some logits with minus infinity
    finite = expected[expected.isfinite()]
    scale = finite.abs().max().clamp_min(1.0) if finite.numel() else 1.0
    error = (torch.where(same, 0.0, (actual - expected).abs()) / scale).nan_to_num(nan=torch.inf)
    return float(error.max()) if error.numel() else 0.0


# ------------------------------------------------------------------------- measurements, of the host and of the hybrid


def whole_output(backbone: Backbone) -> torch.Tensor:
    return backbone.output(**backbone.inputs)


def generated(backbone: Backbone, **kwargs) -> torch.Tensor:
    inputs = {name: value for name, value in backbone.inputs.items() if not name.startswith("decoder_")}
    torch.manual_seed(0)
    return backbone.model.generate(**inputs, **{**GREEDY, **kwargs})


def difference_in_pieces(backbone: Backbone) -> float:
    """Prefill, a chunk and single tokens on one cache are one pass."""
    name = "decoder_input_ids" if "decoder_input_ids" in backbone.inputs else "input_ids"
    ids, whole, cache, pieces = backbone.inputs[name], whole_output(backbone), None, []
    length = ids.shape[1]
    if name == "input_ids":
        cache = DynamicCache()
    for start, stop in ((0, 4), (4, 6), (6, 7), *((t, t + 1) for t in range(7, length))):
        with torch.no_grad():
            torch.manual_seed(0)
            output = backbone.model(
                **{**backbone.inputs, name: ids[:, start:stop], "past_key_values": cache, "use_cache": True}
            )
        cache = output.past_key_values
        pieces.append(first_output(output))
    return relative_error(torch.cat(pieces, dim=1), whole)


def difference_of_generation(backbone: Backbone) -> float:
    """Generation with a cache is generation without."""
    return float((generated(backbone) != generated(backbone, use_cache=False)).sum())


def _padding(backbone: Backbone, side: str) -> float:
    ids = backbone.inputs["input_ids"]
    junk = torch.full((ids.shape[0], 4), 7)
    padded = torch.cat([junk, ids] if side == "left" else [ids, junk], dim=1)
    mask = torch.cat([junk * 0, ids * 0 + 1] if side == "left" else [ids * 0 + 1, junk * 0], dim=1)
    inputs = {**backbone.inputs, "input_ids": padded, "attention_mask": mask}
    if "position_ids" in backbone.parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    elif side == "left" and any("rotary" in type(module).__name__.lower() for module in backbone.model.modules()):
        # a softmax of rotated queries and keys knows distances only, features of them know places: such a model must be told its positions
        raise DoesNotApply
    output, expected = backbone.output(**inputs), whole_output(backbone)
    if output.shape[1] == padded.shape[1] and output.shape != expected.shape:
        output = output[:, 4:] if side == "left" else output[:, :-4]
    return relative_error(output, expected)


def difference_of_left_padding(backbone: Backbone) -> float:
    """Padding before the text changes nothing."""
    return _padding(backbone, "left")


def difference_of_right_padding(backbone: Backbone) -> float:
    """Padding after the text changes nothing."""
    return _padding(backbone, "right")


def difference_of_packed_rows(backbone: Backbone) -> float:
    """Two texts in one row, told by positions that begin again, are two texts."""
    name = "decoder_input_ids" if "decoder_input_ids" in backbone.inputs else "input_ids"
    if "position_ids" not in backbone.parameters or name != "input_ids":
        raise DoesNotApply
    ids = backbone.inputs[name]
    length = ids.shape[1]
    positions = torch.arange(length).repeat(2)[None]
    rest = {key: value for key, value in backbone.inputs.items() if key not in (name, "attention_mask")}
    if rest or ids.shape[0] != 2:
        raise DoesNotApply
    output = backbone.output(input_ids=ids.reshape(1, -1), position_ids=positions, **_without_cache(backbone))
    return relative_error(output.reshape(2, length, -1), whole_output(backbone).reshape(2, length, -1))


def _without_cache(backbone: Backbone) -> dict:
    # with one, transformers does not look for packed rows
    return {"use_cache": False} if "use_cache" in backbone.parameters else {}


def difference_of_later_tokens(backbone: Backbone) -> float:
    """The last token changes nothing before it."""
    name = "decoder_input_ids" if "decoder_input_ids" in backbone.inputs else "input_ids"
    changed = backbone.inputs[name].clone()
    changed[:, -1] = (changed[:, -1] + 1) % 90 + 5
    output = backbone.output(**{**backbone.inputs, name: changed})
    return relative_error(output[:, :-1], whole_output(backbone)[:, :-1])


def gradients(backbone: Backbone) -> set[str]:
    """Names of the parameters that the output depends on."""
    torch.manual_seed(0)
    output = first_output(backbone.model(**backbone.inputs))
    output[output.isfinite()].float().square().mean().backward()
    names = {name for name, parameter in backbone.model.named_parameters() if parameter.grad is not None}
    backbone.model.zero_grad()
    return names


def output_with_pictures(backbone: Backbone) -> torch.Tensor:
    """The main output for text with pictures."""
    return backbone.output(**backbone.picture_inputs)


def _generated_logits(backbone: Backbone, **kwargs) -> torch.Tensor:
    """Logits of the first generated tokens, `[B, 4, V]`."""
    torch.manual_seed(0)
    kwargs = {**backbone.picture_inputs, **GREEDY, **kwargs, "return_dict_in_generate": True, "output_logits": True}
    # a placeholder without a picture is an error
    output = backbone.model.generate(**kwargs, suppress_tokens=[IMAGE_TOKEN])
    return torch.stack(output.logits, dim=1)


def difference_of_generation_with_pictures(backbone: Backbone) -> float:
    """Generation after a picture with a cache is generation without."""
    return relative_error(_generated_logits(backbone), _generated_logits(backbone, use_cache=False))


def difference_of_padding_with_pictures(backbone: Backbone) -> float:
    """Padding before text with a picture changes nothing of what is generated."""
    inputs = backbone.picture_inputs
    padded = {}
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            junk = torch.full_like(inputs[name][:, :4], 7 if name == "input_ids" else 0)
            padded[name] = torch.cat([junk, inputs[name]], dim=1)
    return relative_error(_generated_logits(backbone, **padded), _generated_logits(backbone))


MEASUREMENTS = {
    "output": whole_output,
    "gradients": gradients,
    "generated": generated,
    "cache in pieces": difference_in_pieces,
    "generation": difference_of_generation,
    "left padding": difference_of_left_padding,
    "right padding": difference_of_right_padding,
    "packed rows": difference_of_packed_rows,
    "later tokens": difference_of_later_tokens,
    "with pictures": output_with_pictures,
    "generation with pictures": difference_of_generation_with_pictures,
    "padding with pictures": difference_of_padding_with_pictures,
}


# ------------------------------------------------------------------------------------------------------------ contracts


def distillation(backbone: Backbone) -> None:
    """One training forward gives every site that runs a finite local loss, and gradients to students alone; then the teacher is back."""
    model = backbone.model
    prepare_distillation_(model, "linear_attention", example_inputs=backbone.example_inputs)
    try:
        model.train()
        for inputs in filter(None, (backbone.picture_inputs, backbone.inputs)):
            torch.manual_seed(0)
            output = model(**inputs)
            assert output["block_losses"].isfinite().all(), "a local loss is not finite"
            output["loss"].backward()
        # (a decoder that begins with zeros has a first attention whose output is zero, and so is its loss)
        layers = hybrid_layers(model)
        reached = [layers[name] for name in layers if name in model.training_objective.reached]
        assert reached, "the batch reached no site"
        for layer in reached:
            for name, parameter in layer.hybrid.named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), f"no gradient for {name}"
        frozen = [
            name
            for name, parameter in model.named_parameters()
            if ".hybrid." not in name and parameter.grad is not None
        ]
        assert not frozen, f"gradients for frozen weights: {frozen[0]}"
    finally:
        discard_students_(model)
        model.zero_grad()
        model.eval()
    _exactly_the_host(backbone)


def forward_and_backward(backbone: Backbone) -> None:
    """The hybrid computes something else than the host, finite, and every mixer that runs gets gradients."""
    model, expected = backbone.model, backbone.host["output"]
    output = whole_output(backbone)
    assert output.shape == expected.shape, f"shape {tuple(output.shape)} instead of {tuple(expected.shape)}"
    assert bool((output.isfinite() == expected.isfinite()).all()), "not finite where the host is"
    got = gradients(backbone)
    for name, module in model.named_modules():
        if is_hybrid_attention(module) and any(
            parameter.startswith(f"{name}.") for parameter in backbone.host["gradients"] or ()
        ):
            missing = {f"{name}.hybrid.{parameter}" for parameter, _ in module.hybrid.named_parameters()} - got
            assert not missing, f"no gradient for {min(missing)}"


def softmax_inside(backbone: Backbone) -> None:
    """With the host's softmax inside, the interception changes nothing."""
    with backbone.softmax():
        assert (error := relative_error(whole_output(backbone), backbone.host["output"])) <= EXACT, (
            f"off by {error:.1e}"
        )
        if backbone.host["generated"] is not None:
            assert torch.equal(generated(backbone), backbone.host["generated"]), "generation differs"


def pictures(backbone: Backbone) -> None:
    """Text with pictures in it: the softmax inside changes nothing, generation with a cache is generation without, padding changes nothing."""
    expected = backbone.host["with pictures"]
    if expected is None:
        raise DoesNotApply
    with backbone.softmax():
        assert (error := relative_error(output_with_pictures(backbone), expected)) <= EXACT, f"off by {error:.1e}"
    assert output_with_pictures(backbone).isfinite().all(), "not finite"
    for name in ("generation with pictures", "padding with pictures"):
        if backbone.keeps(name):
            assert (error := MEASUREMENTS[name](backbone)) <= TOLERANCE, f"{name} off by {error:.1e}"


def causality(backbone: Backbone) -> None:
    """Where the last token changes nothing before it, it still does not; where it does, it still does."""
    if backbone.host["later tokens"] is None:
        raise DoesNotApply
    error = difference_of_later_tokens(backbone)
    if backbone.keeps("later tokens"):
        assert error <= TOLERANCE, f"off by {error:.1e}"
    elif backbone.model_type not in PICTURE_BLOCKS:
        # (those see their whole prompt, and conversion says that this is lost)
        assert error > 0, "tokens no longer see what comes after them"


def _same_number(name: str) -> Callable[[Backbone], None]:
    def contract(backbone: Backbone) -> None:
        if not backbone.keeps(name):
            raise DoesNotApply
        assert (error := MEASUREMENTS[name](backbone)) <= TOLERANCE, f"off by {error:.1e}"

    contract.__doc__ = MEASUREMENTS[name].__doc__
    return contract


def difference_after_reload(backbone: Backbone) -> float:
    """What saving and loading by its own class changes."""
    model, expected = backbone.model, whole_output(backbone)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        backbone.model = type(model).from_pretrained(folder).eval()
    try:
        return relative_error(whole_output(backbone), expected)
    finally:
        backbone.model = model


MEASUREMENTS["reload"] = difference_after_reload


def save_and_load(backbone: Backbone) -> None:
    """The checkpoint loads through the Auto class that knows the model, with all weights, and computes the same bits."""
    if not backbone.keeps("reload"):
        raise DoesNotApply
    model = backbone.model
    expected = whole_output(backbone)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        assert type(config) is type(model.config), f"AutoConfig gave {type(config).__name__}"
        loaded, info = auto_class(model).from_pretrained(folder, output_loading_info=True)
    wrong = [kind for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]
    assert not wrong, f"{wrong[0]}: {sorted(map(str, info[wrong[0]]))[:2]}"
    assert type(loaded) is type(model), f"{auto_class(model).__name__} gave {type(loaded).__name__}"
    # in memory of their own: a processor adds up numbers in another order where rows begin at another alignment, as in a mapped file
    for tensor in itertools.chain(loaded.parameters(), loaded.buffers()):
        tensor.data = tensor.data.clone()
    backbone.model = loaded.eval()
    try:
        assert (error := relative_error(whole_output(backbone), expected)) == 0.0, f"off by {error:.1e}"
    finally:
        backbone.model = model


def auto_class(model) -> type:
    """An Auto class that loads this very model class; the class itself where none does."""
    for auto in (modeling_auto.AutoModel, *AUTO_CLASSES):
        if auto is modeling_auto.AutoBackbone:  # wants a repository's name
            continue
        known = auto._model_mapping._extra_content.get(type(model.config), ())
        first = known[0] if isinstance(known, (tuple, list)) and known else known
        if first is type(model):
            return auto
    return type(model)


def deepcopy(backbone: Backbone) -> None:
    """A copy computes the same."""
    model, expected = backbone.model, whole_output(backbone)
    backbone.model = copy.deepcopy(model)
    try:
        assert relative_error(whole_output(backbone), expected) == 0.0, "the copy computes something else"
    finally:
        backbone.model = model


def restore(backbone: Backbone) -> None:
    """Everything is as it was, bit for bit."""
    restore_full_attention(backbone.model)
    _exactly_the_host(backbone)


def _exactly_the_host(backbone: Backbone) -> None:
    assert (type(backbone.model), type(backbone.model.config)) == backbone.original, "classes differ"
    assert list(backbone.model.state_dict()) == backbone.keys, "names of weights differ"
    error = relative_error(whole_output(backbone), backbone.host["output"])
    assert error == 0.0, f"off by {error:.1e}"


# before conversion, after it, and last
DISTILLATION = {"distillation": distillation}
CONVERTED = {
    "forward and backward": forward_and_backward,
    "softmax inside": softmax_inside,
    "causality": causality,
    "cache": _same_number("cache in pieces"),
    "generation": _same_number("generation"),
    "left padding": _same_number("left padding"),
    "right padding": _same_number("right padding"),
    "packed rows": _same_number("packed rows"),
    "pictures": pictures,  # after those on text alone: generation after a picture leaves a shift of positions in some models
    "save and load": save_and_load,
    "deepcopy": deepcopy,
    "restore": restore,
}
CONTRACTS = {**DISTILLATION, **CONVERTED}


def check(task: str, model_type: str, every_other_head: bool = False) -> Row:
    """Every contract on one pair, with all attention linear or with every other key-value head of every layer."""
    row = Row(task, model_type)
    try:
        with harness_errors():
            cls = model_class(task, model_type)
            has_no_forward = cls.forward is torch.nn.Module.forward
        if has_no_forward:
            with torch.device("meta"), harness_errors():
                model = cls(toy_config(model_type))
            try:
                probe_attention(model)
            except UnsupportedModelError as error:
                row.word, row.why = "refused", str(error)
                return row
        backbone = Backbone(task, model_type, every_other_head)
    except ToyConfigError as error:
        row.word, row.why = "harness", str(error)
        return row
    row.model = type(backbone.model).__name__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is lost is in the row
        try:
            probed = probe_attention(backbone.model, backbone.example_inputs)
        except UnsupportedModelError as error:
            row.word, row.why = "refused", str(error)
            return row
        _note(row, probed)
        if not any(reached(backbone, site.name) for site in probed.sites):
            # what the toy inputs run keeps its softmax: nothing here would be tested
            reason = next((f"{name} {why}" for name, why in probed.excluded.items()), None) or probed.why_none()
            row.word = "refused"
            row.why = f"{reason.rstrip('.')}. Only {probed.sites[0].name} and its like can be converted."
            return row
        for name, contract in () if every_other_head else DISTILLATION.items():
            row.contracts[name] = _verdict(contract, backbone)
        try:
            convert(backbone, probed)
        except UnsupportedModelError as error:
            row.word, row.why = "refused", str(error)
            return row
        except Exception as error:
            row.word, row.why = "fails", f"conversion: {type(error).__name__}: {error}"
            return row
        for name, contract in CONVERTED.items():
            row.contracts[name] = _verdict(contract, backbone)
    broken = [name for name, verdict in row.contracts.items() if verdict not in ("ok", "-")]
    if broken:
        row.word, row.why = "fails", f"{broken[0]}: {row.contracts[broken[0]]}"
    else:
        row.word = "loses" if row.lost else "works"
    return row


def reached(backbone: Backbone, name: str) -> bool:
    """Whether a forward with the toy inputs runs the module."""
    ran = []
    handle = backbone.model.get_submodule(name).register_forward_pre_hook(lambda *_: ran.append(name))
    try:
        whole_output(backbone)
    finally:
        handle.remove()
    return bool(ran)


def convert(backbone: Backbone, probed: ProbedModel) -> None:
    """All attention linear, or every other head of it, and mixers moved from their start, so that equal-looking initial values hide nothing."""
    heads = {site.name: list(site.key_value_heads)[::2] for site in probed.sites} if backbone.every_other_head else None
    convert_to_hybrid(backbone.model, "linear_attention", heads=heads, example_inputs=backbone.example_inputs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if ".hybrid." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def _note(row: Row, probed: ProbedModel) -> None:
    row.sites = len(probed.sites)
    row.excluded = {name: why for name, why in probed.excluded.items() if "cross-attention" not in why}
    row.lost = tuple(sorted({what for lost in probed.lost.values() for what in lost}))


def _verdict(contract: Callable[[Backbone], None], backbone: Backbone) -> str:
    try:
        contract(backbone)
        return "ok"
    except DoesNotApply:
        return "-"
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0][:300]
