"""
`hf-hybrid`: a thin shell over the library's functions, one verb each. Options are dataclasses, parsed by
`HfArgumentParser`.
"""

import importlib
import os
import sys


# The modules of this folder, and what each does. They are imported when they are asked for.
VERBS = {
    "distill": "Distil every attention layer on text and write the mixer bank to output_dir.",
    "search": "Swap layers greedily on your data, with the students of a bank, and save the hybrid to output_dir.",
    "repair": "Train a hybrid on its teacher's predictions, the teacher being itself with its switch off; save it.",
    "convert": "Replace layers or single heads without training, or by the students of a bank, and save the hybrid.",
    "evaluate": "Perplexity of text, or accuracy of label words, of any model, hybrid or not.",
    "ablate": "What the states of a hybrid with windows contribute, and its perplexity without them.",
    "benchmark": "Prefill and decode time and cache bytes of a hybrid beside its teacher's.",
    "inspect": "What can be made linear in a model, what would be lost, and what is kept in place of its cache.",
    "demo": "The whole method on a real pretrained model: SmolLM2-135M becomes a sentiment hybrid.",
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in VERBS:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        lines = "\n".join(f"  {name:10s} {summary}" for name, summary in VERBS.items())
        print(
            f"usage: hf-hybrid COMMAND [options]    (hf-hybrid COMMAND --help)\n\n{lines}",
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    return _run(arguments[0], arguments[1:])


def _run(name: str, arguments: list[str]) -> int:
    from datasets.exceptions import DatasetsError
    from safetensors import SafetensorError
    from transformers import HfArgumentParser
    from transformers.utils import logging

    from ..errors import HybridError
    from ..ops import fast_fp32_matmul
    from .preset_options import use_preset

    verb = importlib.import_module(f".{name}", __package__)
    parser = HfArgumentParser(verb.OPTIONS, prog=f"hf-hybrid {name}", description=VERBS[name])
    logging.set_verbosity_warning()
    try:
        if hasattr(verb, "STAGES"):
            use_preset(parser, verb.STAGES, arguments)
        options = parser.parse_args_into_dataclasses(_model_first(arguments))
        with fast_fp32_matmul():
            verb.run(*options)
    except KeyboardInterrupt:
        print(
            "interrupted; what was finished is on disk: run again with --resume (distill, repair: "
            "--resume_from_checkpoint true) to continue",
            file=sys.stderr,
        )
        return 130
    # what files, settings, memory and missing packages raise is one line; anything else is a fault of the program, and
    # its traceback is what a report of it needs
    except (HybridError, OSError, ValueError, RuntimeError, ImportError, DatasetsError, SafetensorError) as error:
        if os.environ.get("HF_HYBRID_TRACEBACK"):
            raise
        kind = "" if isinstance(error, HybridError) else f"{type(error).__name__}: "
        print(f"hf-hybrid {name}: {kind}{error} (HF_HYBRID_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    return 0


def _model_first(arguments: list[str]) -> list[str]:
    """`hf-hybrid inspect NAME …` is `hf-hybrid inspect --model NAME …`."""
    if arguments and not arguments[0].startswith("-"):
        return ["--model", *arguments]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
