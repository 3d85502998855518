"""Model folders on disk: listing, versions, and loading denoisers from them.

Serving and experiments share this reader; the engine calls it by a protocol. Networks are loaded
without pydantic, so that training and comparison run where it is not installed.
"""

from els_service.repository.folders import (
    FOLDS_FILE,
    THRESHOLDS_FILE,
    WINDOWS_FILE,
    model_folder,
    newest_version,
)
from els_service.repository.repository import ModelRepository, bundled_models, load_network_folder
from els_service.repository.window_files import read_folds, read_thresholds, read_windows

__all__ = [
    "FOLDS_FILE",
    "THRESHOLDS_FILE",
    "WINDOWS_FILE",
    "ModelRepository",
    "bundled_models",
    "load_network_folder",
    "model_folder",
    "newest_version",
    "read_folds",
    "read_thresholds",
    "read_windows",
]
