"""`hf-hybrid demo`: the whole method on a real pretrained model."""

from rich.console import Console

from ..demo.run import DemoArguments, run_demo


OPTIONS = (DemoArguments,)


def run(options: DemoArguments) -> None:
    """The whole method on a real pretrained model: SmolLM2-135M becomes a sentiment hybrid."""
    run_demo(options, Console())
