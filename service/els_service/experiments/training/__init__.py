"""Training of networks: settings, data, the loop, checkpoints and the record of a run."""

from els_service.experiments.training.data import load_training_data
from els_service.experiments.training.loop import Limits, Outcome, train
from els_service.experiments.training.settings import RATES, TrainingSettings

__all__ = [
    "RATES",
    "Limits",
    "Outcome",
    "TrainingSettings",
    "load_training_data",
    "train",
]
