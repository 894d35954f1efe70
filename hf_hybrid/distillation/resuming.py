"""Where a run goes on after an interruption: from a checkpoint, from finished mixers, or not at all."""

import os

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from ..adapters.bank import (
    BANK_FOLDER,
)
from ..adapters.first_format import CONFIG_FILE as FIRST_BANK
from ..errors import (
    OutputFolderError,
)
from ..search.greedy import TRACE_FILE
from .checks import (
    last_complete_checkpoint,
)


logger = logging.get_logger(__name__)


class Resumes:
    """Put in front of the Trainer: decides on rank 0, for all ranks."""

    def _where_to_start(self, resume_from_checkpoint: str | bool | None) -> tuple[str | None, bool]:
        """The checkpoint to go on from, if any, and whether the search alone is left to do."""
        if resume_from_checkpoint is not True:
            if not resume_from_checkpoint:
                self.check_output_folder()
            return resume_from_checkpoint or None, False
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        if checkpoint is None and self._distilled_already():
            return None, True
        if checkpoint is None:
            if os.path.exists(os.path.join(self.args.output_dir, "config.json")):
                self.check_output_folder()  # a model, but no run to go on with
            logger.warning(f"{self.args.output_dir} holds no complete checkpoint to resume from: starting at step 0.")
        return checkpoint, False

    def _distilled_already(self) -> bool:
        """Whether the output folder holds the finished mixers of a run that kept no checkpoints."""
        try:
            state = TrainerState.load_from_json(os.path.join(self._bank_folder, TRAINER_STATE_NAME))
        except (OSError, ValueError, TypeError):
            return False
        finished = 0 < state.max_steps <= state.global_step
        if finished and self.args.max_steps > state.global_step:
            raise OutputFolderError(
                f"output_dir={self.args.output_dir!r} holds a run that was finished at step {state.global_step} and "
                "kept no checkpoints; got "
                f"max_steps={self.args.max_steps}. Choose another folder and pass mixer_bank={self._bank_folder!r} to "
                "train on."
            )
        return finished and os.path.exists(os.path.join(self._bank_folder, ADAPTER_CONFIG))

    def _go_on_with_the_search(self) -> TrainOutput:
        logger.info(f"{self.args.output_dir} holds the finished mixers of this run: going on with the search.")
        self._shard()
        self._load_students(self._bank_folder)
        self.state = TrainerState.load_from_json(os.path.join(self._bank_folder, TRAINER_STATE_NAME))
        self.state.init_training_references(self, self.state.max_steps, self.state.num_train_epochs, None)
        self.unwrapped.eval()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, float("nan"), {})

    def _run_epoch(self, *args, **kwargs):
        """
        As the Trainer's, but for a training that has taken its last step: resumed within an epoch, it would take one
        more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def check_output_folder(self) -> None:
        """Raise [`OutputFolderError`] if `args.output_dir` holds a run or a model already."""
        folder = self.args.output_dir
        names = os.listdir(folder) if os.path.isdir(folder) else []
        ours = [
            name
            for name in sorted(names)
            if name in (TRACE_FILE, FIRST_BANK, BANK_FOLDER, ADAPTER_CONFIG, "config.json")
            or name.startswith(PREFIX_CHECKPOINT_DIR + "-")
        ]
        if ours:
            raise OutputFolderError(
                f"output_dir={folder!r} holds another run ({', '.join(ours[:4])}). Pass resume_from_checkpoint=True to "
                "continue it, or choose another folder."
            )

    @property
    def _bank_folder(self) -> str:
        return os.path.join(self.args.output_dir, BANK_FOLDER)
