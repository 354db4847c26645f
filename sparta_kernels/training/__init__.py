"""Standard and adversarial training, with checkpoints that resume bit for bit."""

from .checkpoint import CheckpointError, build_model, load_checkpoint
from .loop import Batch, Epoch, TrainingDiverged, model_arguments, read_run, train
from .progress import TrainingProgress
from .settings import ATTACKS, MODELS, SCHEDULES, Settings

__all__ = [
    "ATTACKS",
    "MODELS",
    "SCHEDULES",
    "Batch",
    "CheckpointError",
    "Epoch",
    "Settings",
    "TrainingDiverged",
    "TrainingProgress",
    "build_model",
    "load_checkpoint",
    "model_arguments",
    "read_run",
    "train",
]
