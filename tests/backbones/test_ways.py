"""Ways of running that test_running.py shows on one family, on others of every kind."""

import copy

import peft
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache
from transformers.pytorch_utils import Conv1D

from hf_hybrid import convert_to_hybrid

from .contracts import auto_class, first_output, relative_error
from .pictures import picture_inputs
from .toy_inputs import ids
from .toy_models import toy_inputs, toy_model


DECODERS = ["gpt2", "gemma3_text", "qwen3", "gpt_oss", "mixtral", "llama4_text", "falcon_h1", "deepseek_v3", "bloom"]
OTHERS = [
    ("masked-lm", "bert"), ("masked-lm", "modernbert"), ("masked-lm", "deberta-v2"), ("seq2seq-lm", "t5"), ("seq2seq-lm", "bart"),
    ("image-classification", "vit"), ("speech-seq2seq", "whisper"), ("ctc", "wav2vec2"), ("zero-shot-image", "clip"),
    ("image-text-to-text", "llava"),
]  # fmt: skip
ALL = [*(("causal-lm", name) for name in DECODERS), *OTHERS]
pytestmark = pytest.mark.filterwarnings("ignore:.*layers lose")
kinds = pytest.mark.parametrize(("task", "model_type"), ALL)
some_or_all = pytest.mark.parametrize("layers", [[0], None], ids=["first", "all"])


def hybrid(task, model_type, layers=None):
    """A hybrid with mixers moved from their start, and inputs."""
    model = toy_model(task, model_type)
    inputs = picture_inputs(model, model_type) or toy_inputs(model, model_type)
    convert_to_hybrid(model, "linear_attention", layers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".hybrid." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, inputs


def output(model, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        return first_output(model(**inputs))


@pytest.mark.parametrize("model_type", DECODERS)
@some_or_all
def test_compiled_decoding_has_one_graph_per_kind_of_step(model_type, layers):
    model, _ = hybrid("causal-lm", model_type, layers)
    if model_type == "deepseek_v3" and layers is not None:
        layers = None  # its own softmax does not compile at this size
        model, _ = hybrid("causal-lm", model_type)
    text = ids(2, 13)
    torch.compiler.reset()
    counter = CompileCounter()
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=24)
    with torch.no_grad():
        pieces = [model(input_ids=text[:, :9], past_key_values=cache).logits]
        for t in range(9, 13):
            positions = torch.full((2, 1), t)
            pieces.append(step(input_ids=text[:, t : t + 1], past_key_values=cache, position_ids=positions).logits)
        assert relative_error(torch.cat(pieces, dim=1), model(input_ids=text, use_cache=False).logits) < 1e-4
    # sliding windows compile twice, in the untouched host too: before the window is full and after
    assert counter.frame_count <= 2


@kinds
def test_torch_export(task, model_type):
    model, inputs = hybrid(task, model_type)
    names = [name for name, value in inputs.items() if torch.is_tensor(value)]

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *values):
            return first_output(self.model(**dict(zip(names, values, strict=True))))

    expected = output(model, inputs)
    with torch.no_grad():
        program = torch.export.export(Wrapped(), tuple(inputs[name] for name in names), strict=False)
        torch.manual_seed(0)
        assert relative_error(program.module()(*(inputs[name] for name in names)), expected) < 1e-5


@kinds
@some_or_all
def test_gradient_checkpointing(task, model_type, layers):
    model, inputs = hybrid(task, model_type, layers)
    without_dropout(model)
    # fp64: checkpointing turns caches off, and with them other sums of the same numbers run (experts' products have no fp64 form)
    if not any("expert" in name for name, _ in model.named_modules()):
        model.double()
        inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        first_output(model(**inputs)).float().square().mean().backward()
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert plain.keys() == again.keys() and any(".hybrid." in name for name in plain)
    for name, gradient in plain.items():
        assert torch.allclose(again[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max() + 1)), name


def without_dropout(model):
    model.train()
    for module in model.modules():
        for name, value in vars(module).items():
            if ("drop" in name and isinstance(value, float)) or (isinstance(module, torch.nn.Dropout) and name == "p"):
                setattr(module, name, 0.0)
    for name, off in (("layerdrop", 0.0), ("apply_spec_augment", False)):
        if hasattr(model.config, name):
            setattr(model.config, name, off)


@kinds
def test_lora_beside_the_mixers(task, model_type):
    model, inputs = hybrid(task, model_type)
    expected = output(model, inputs)
    linear = {
        name.split(".")[-1]
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and not name.endswith(("out_proj", "lm_head"))
        and "router" not in name
    }
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=sorted(linear), modules_to_save=["hybrid"]))
    assert relative_error(output(adapted, inputs), expected) == 0.0
    torch.manual_seed(0)
    first_output(adapted(**inputs)).float().square().mean().backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any("lora_B" in name for name in trained)
    assert any(".hybrid.modules_to_save" in name for name in trained)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(task, model_type, dtype):
    """As near to fp32 as the host is, within a factor of three."""
    host, (model, inputs) = toy_model(task, model_type), hybrid(task, model_type)
    errors = []
    for one in (host, model):
        expected, low = output(one, inputs), copy.deepcopy(one).to(dtype)
        cast = {name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}
        errors.append(relative_error(output(low, cast).float(), expected))
    assert errors[1] <= max(3 * errors[0], 2 * torch.finfo(dtype).eps)


@kinds
def test_layers_on_disk(task, model_type, tmp_path):
    model, inputs = hybrid(task, model_type)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path / "model")
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    layers = next(
        name for name in lists if any(".hybrid" in inner for inner, _ in model.get_submodule(name).named_modules())
    )
    last = f"{layers}.{len(model.get_submodule(layers)) - 1}"
    loaded = auto_class(model).from_pretrained(
        tmp_path / "model", device_map=device_map(model, last), offload_folder=str(tmp_path / "off")
    )
    assert {parameter.device.type for parameter in loaded.get_submodule(last).parameters()} == {"meta"}
    assert relative_error(output(loaded.eval(), inputs), expected) == 0.0


def device_map(model, on_disk: str) -> dict[str, str]:
    """Every module on the CPU but one, by the largest modules that do not hold it."""
    places, path = {}, ""
    for piece in on_disk.split("."):
        parent = model.get_submodule(path)
        for name, _ in parent.named_children():
            places[f"{path}.{name}".lstrip(".")] = "disk" if f"{path}.{name}".lstrip(".") == on_disk else "cpu"
        for name, _ in (*parent.named_parameters(recurse=False), *parent.named_buffers(recurse=False)):
            places[f"{path}.{name}".lstrip(".")] = "cpu"
        path = f"{path}.{piece}".lstrip(".")
        places.pop(path) if path != on_disk else None
    return places
