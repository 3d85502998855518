"""The training loop: denoising score matching, resumable at any step, reproducible by seed.

The loss is the mean square of F(c_in·x, t, label) - (x0 - c_skip·x)/c_out with t uniform on
{1 … 1000}/1000, for any parametrisation F. On a CPU an interrupted and resumed run gives the same
bits as an uninterrupted one with the same number of threads; on a GPU the same up to rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from els_service.denoisers.analytic import bank_info
from els_service.denoisers.banks import Bank
from els_service.denoisers.engines.modules import allow_tf32
from els_service.denoisers.files import write_atomically
from els_service.denoisers.networks.config import Execution, NetworkDocument
from els_service.denoisers.networks.denoiser import Forward, memory_format
from els_service.denoisers.networks.folder import (
    MODEL_FILE,
    WEIGHTS_FILE,
    save_network_folder,
)
from els_service.denoisers.networks.modules import Network, build_network
from els_service.errors import ElsError, InvalidArgumentError, LoadError
from els_service.experiments.training.checkpoint import (
    CHECKPOINT_FILE,
    Progress,
    State,
    restore_checkpoint,
    save_checkpoint,
)
from els_service.experiments.training.data import Batch, Batches
from els_service.experiments.training.record import Row, append_log, plot_loss, read_log, write_log
from els_service.experiments.training.settings import TrainingSettings
from els_service.repository import WINDOWS_FILE

RECORD_FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on when a call pauses, saves and reports; they do not change the weights.

    Raises:
        InvalidArgumentError: A field is negative or not a number, or ``log_steps`` is 0.
    """

    seconds: float = math.inf
    """Minutes after which the run pauses; the same call resumes it."""
    checkpoint_s: float = 30.0
    log_steps: int = 50

    def __post_init__(self) -> None:
        for name, lowest in (("seconds", 0), ("checkpoint_s", 0), ("log_steps", 1)):
            value = getattr(self, name)
            if not value >= lowest:
                raise InvalidArgumentError(name, f"at least {lowest}", value)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a call."""

    step: int
    steps: int
    loss: float
    """Loss in the last row of the log."""

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.steps


def train(
    settings: TrainingSettings,
    bank: Bank,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    limits: Limits | None = None,
    command: str = "",
    storage: torch.dtype = torch.float32,
    report: Callable[[Row, int], None] = lambda row, steps: None,
) -> Outcome:
    """Train a network, or resume training, and write a servable model folder.

    Args:
        settings: settings that determine the weights.
        bank: the training images.
        out: model folder; also has the checkpoint, which a finished model does not need.
        device: device to train on.
        limits: when to pause, save and report.
        command: command line, for the record.
        storage: dtype of the stored weights.
        report: callback with every row of the log and the number of steps.

    Raises:
        InvalidArgumentError: Data or device are incompatible with the settings.
        LoadError: ``out`` has a checkpoint of another run (names the setting that differs), or a
            model without a checkpoint.
        ElsError: The loss is no longer finite.
    """
    limits, device = limits or Limits(), torch.device(device)
    _check(settings, bank, device)
    _check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(settings, bank, out, device, limits)
    with allow_tf32(settings.precision == "tf32"), _repeatable():
        run.resume(report)
    _save(run, bank, command, storage)
    return Outcome(run.progress.step, run.steps, run.rows[-1].loss if run.rows else math.nan)


class _Run:
    """A training run; the constructor restores a checkpoint in ``out``."""

    def __init__(
        self,
        settings: TrainingSettings,
        bank: Bank,
        out: Path,
        device: torch.device,
        limits: Limits,
    ) -> None:
        self.settings, self.device = settings, device
        self.steps = settings.steps(len(bank.images))
        self._out, self._limits = out, limits
        self._batches = Batches(bank, settings, device)
        self.network = _new_network(settings, device)
        average = copy.deepcopy(self.network).requires_grad_(False) if settings.ema else None
        optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=settings.rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.progress = Progress()
        self._state = State(self.network, average, optimizer, self.progress)
        self._key = settings.described() | {"data": bank.fingerprint}
        restore_checkpoint(out, self._state, self._key)
        self.rows = read_log(out, self.progress.step)
        write_log(out, self.rows)
        self._epoch_steps = len(bank.images) / settings.batch

    @property
    def weights(self) -> dict[str, Tensor]:
        """The moving average of the weights if there is one, otherwise the weights."""
        return (self._state.average or self.network).state_dict()

    def resume(self, report: Callable[[Row, int], None]) -> None:
        """Take steps until all are done or the time is over, and write a checkpoint."""
        compiled = self.settings.compile
        forward: Forward = torch.compile(self.network) if compiled else self.network
        progress, started = self.progress, time.monotonic()
        saved, before = started, self.progress.seconds
        # Kept on the device: reading it at every step would synchronise the GPU.
        loss = torch.tensor(progress.loss_sum, dtype=torch.float64, device=self.device)
        while progress.step < self.steps:
            loss += self._step(forward)
            progress.step += 1
            progress.loss_steps += 1
            now = time.monotonic()
            progress.seconds = before + now - started
            if progress.step % self._limits.log_steps == 0 or progress.step == self.steps:
                self._log(loss, report)
                loss.zero_()
            if now - started >= self._limits.seconds:
                break
            if now - saved >= self._limits.checkpoint_s:
                self._checkpoint(loss)
                saved = now
        self._checkpoint(loss)

    def _step(self, forward: Forward) -> Tensor:
        """Take one step; return its loss."""
        step, optimizer = self.progress.step, self._state.optimizer
        for group in optimizer.param_groups:
            group["lr"] = self.settings.rate_at(step, self.steps)
        loss = self._loss(forward, self._batches(step))
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self._state.average is not None:
            _follow(self._state.average, self.network, _decay(self.settings.ema, step))
        return loss.detach()

    def _loss(self, forward: Forward, batch: Batch) -> Tensor:
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"
        ):
            output = forward(batch.x, batch.time, batch.labels)
        return functional.mse_loss(output.float(), batch.target)

    def _log(self, loss: Tensor, report: Callable[[Row, int], None]) -> None:
        progress = self.progress
        mean = self._finite(loss) / progress.loss_steps
        rate = self.settings.rate_at(progress.step - 1, self.steps)
        epoch = progress.step / self._epoch_steps
        row = Row(progress.step, epoch, mean, rate, progress.seconds)
        append_log(self._out, row)
        self.rows.append(row)
        progress.loss_steps = 0
        report(row, self.steps)

    def _checkpoint(self, loss: Tensor) -> None:
        self.progress.loss_sum = self._finite(loss)
        save_checkpoint(self._out, self._state, self._key)

    def _finite(self, loss: Tensor) -> float:
        value, step = float(loss), self.progress.step
        if not math.isfinite(value):
            raise ElsError(f"loss: expected a finite number, got {value} at step {step}")
        return value


def _check(settings: TrainingSettings, bank: Bank, device: torch.device) -> None:
    network = settings.network
    if bank.shape != network.shape:
        raise InvalidArgumentError("data", f"images of shape {network.shape}", bank.shape)
    if network.label_count > bank.label_count:
        raise InvalidArgumentError("data", f"{network.label_count} labels", bank.label_count)
    if settings.precision == "tf32" and device.type != "cuda":
        raise InvalidArgumentError("precision", "float32 or bfloat16 on a CPU", "tf32")


def _check_folder(out: Path) -> None:
    """Reject a folder with a model but no checkpoint, which is not of this run."""
    if (out / CHECKPOINT_FILE).exists():
        return
    versions = sorted(out.glob(f"[0-9]*/{MODEL_FILE}"))
    for path in (out / MODEL_FILE, out / WEIGHTS_FILE, out / WINDOWS_FILE, *versions):
        if path.exists():
            expected = "expected no model, or one with its checkpoint"
            raise LoadError(path, f"{expected}, got this; use another --out to start over")


def _new_network(settings: TrainingSettings, device: torch.device) -> Network:
    """Return the network with its seed's weights, which are the same on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = build_network(settings.network)
    network.set_layout(memory_format(settings.channels_last))
    return network.to(device)


def _decay(ema: float, step: int) -> float:
    """Return the decay of the average: smaller at first, to forget the random initial weights."""
    return min(ema, (1 + step) / (10 + step))


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)


@contextmanager
def _repeatable() -> Iterator[None]:
    """Let cuDNN select the fastest of its deterministic algorithms."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=True,
        deterministic=True,
        allow_tf32=cudnn.allow_tf32,
    ):
        yield


def _save(run: _Run, bank: Bank, command: str, storage: torch.dtype) -> None:
    document = NetworkDocument(run.settings.network, Execution(), bank_info(bank))
    save_network_folder(run._out, document, run.weights, storage)
    plot_loss(run._out, run.rows)
    write_atomically(
        run._out / RECORD_FILE, json.dumps(_record(run, bank, command), indent=1).encode()
    )


def _record(run: _Run, bank: Bank, command: str) -> dict[str, Any]:
    """Return the settings to reproduce the training, and its results."""
    return {
        "command": command,
        "settings": run.settings.described(),
        "data": dataclasses.asdict(bank_info(bank)),
        "step": run.progress.step,
        "steps": run.steps,
        "seconds": round(run.progress.seconds, 1),
        # With the log's digits, which are all that a resumed run has.
        "loss": float(f"{run.rows[-1].loss:.6g}") if run.rows else None,
        "parameters": sum(parameter.numel() for parameter in run.network.parameters()),
        "device": _device_name(run.device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
