"""Standard and adversarial training, with checkpoints that resume bit for bit."""

from .checkpoint import CheckpointError, build_model, load_checkpoint
from .history import Batch, Epoch
from .loop import train
from .progress import TrainingProgress
from .run import TrainingDiverged, finished, model_arguments, read_run
from .settings import ATTACKS, LOSSES, MODELS, SCHEDULES, Settings
from .transfer import Transferred, freeze_sparta, keep_frozen_in_eval, transfer

__all__ = [
    "ATTACKS",
    "LOSSES",
    "MODELS",
    "SCHEDULES",
    "Batch",
    "CheckpointError",
    "Epoch",
    "Settings",
    "TrainingDiverged",
    "TrainingProgress",
    "Transferred",
    "build_model",
    "finished",
    "freeze_sparta",
    "keep_frozen_in_eval",
    "load_checkpoint",
    "model_arguments",
    "read_run",
    "train",
    "transfer",
]
