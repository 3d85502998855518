"""Trained networks as denoisers: configuration, modules, weights and execution."""

from els_service.denoisers.networks.config import (
    Execution,
    NetworkConfig,
    NetworkDocument,
    parse_network,
)
from els_service.denoisers.networks.denoiser import NetworkDenoiser
from els_service.denoisers.networks.folder import (
    MODEL_FILE,
    WEIGHTS_FILE,
    load_network,
    save_network_folder,
)
from els_service.denoisers.networks.modules import Network, build_network
from els_service.denoisers.networks.parametrisation import PREDICTIONS, Parametrisation, parametrise

__all__ = [
    "MODEL_FILE",
    "PREDICTIONS",
    "WEIGHTS_FILE",
    "Execution",
    "Network",
    "NetworkConfig",
    "NetworkDenoiser",
    "NetworkDocument",
    "Parametrisation",
    "build_network",
    "load_network",
    "parametrise",
    "parse_network",
    "save_network_folder",
]
