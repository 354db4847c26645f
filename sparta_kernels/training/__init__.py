"""Standard and adversarial training, with checkpoints that resume bit for bit."""

from .checkpoint import WEIGHTS, CheckpointError, build_model, load_checkpoint, read_metadata
from .config import ConfigError, as_toml, read_config
from .history import Batch, Epoch
from .logs import TrainingLog
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
    "WEIGHTS",
    "Batch",
    "CheckpointError",
    "ConfigError",
    "Epoch",
    "Settings",
    "TrainingDiverged",
    "TrainingLog",
    "TrainingProgress",
    "Transferred",
    "as_toml",
    "build_model",
    "finished",
    "freeze_sparta",
    "keep_frozen_in_eval",
    "load_checkpoint",
    "model_arguments",
    "read_config",
    "read_metadata",
    "read_run",
    "train",
    "transfer",
]
