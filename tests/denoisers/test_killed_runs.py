"""Training and calibration, killed at every write in turn, go on to the same bits."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.commands import run
from tests.support.comparing import write_bank, write_network
from tests.support.processes import run_script
from tests.support.training import bars

from els_service.denoisers.banks import make_bank, save_bank

# The same command again and again, killed at its 1st, 2nd, 3rd … write, until one ends. What it
# imports is imported once, torch and its optimizers too: every run is a fork. It prints the exit
# codes.
_KILLED_AT_EVERY_WRITE = """
import os, signal, sys
from pathlib import Path
import pydantic.fields, torch._dynamo
from PIL import Image
from els_service.cli import calibrate, main, train
from els_service.experiments.training import loop, record
Image.init()

def run(last):
    count = 0
    def passed(before=lambda: None):
        nonlocal count
        count += 1
        if count == last:
            before()
            os.kill(os.getpid(), signal.SIGKILL)
    def killing(module, name, torn=lambda *arguments: None):
        real = getattr(module, name)
        def wrapped(*arguments, **named):
            passed(lambda: torn(*arguments))
            result = real(*arguments, **named)
            passed()
            return result
        setattr(module, name, wrapped)
    def half_a_row(folder, row):
        with (folder / record.LOG_FILE).open("a") as file:
            file.write(",".join(record._fields(row))[:-3])
    for name in ("fsync", "replace"):
        killing(os, name)
    killing(loop, "append_log", half_a_row)
    killing(Path, "unlink")
    try:
        main()
    except SystemExit as end:
        os._exit(end.code)

codes = []
while not codes or codes[-1] < 0:
    child = os.fork()
    if child == 0:
        try:
            run(len(codes) + 1)
        finally:
            os._exit(99)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert len(codes) < 200
print("codes", *codes)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "killed.py"
    path.write_text(_KILLED_AT_EVERY_WRITE)
    return path


def killed_at_every_write(script: Path, command: str, arguments: list[str]) -> int:
    """Run a command to its end; return how often it was killed before."""
    shown = run_script(script, command, *arguments, timeout_s=120)
    assert shown.returncode == 0, shown.stderr
    *kills, end = shown.stdout.split("codes ")[-1].split()
    assert (set(kills), end) == ({str(-signal.SIGKILL)}, "0"), shown.stderr
    return len(kills)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """The commands set the number of threads of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def read_json(path: Path, *without: str) -> dict[str, object]:
    content = json.loads(path.read_text())
    return {name: value for name, value in content.items() if name not in without}


@pytest.mark.slow
def test_a_training_killed_at_every_write_in_turn_goes_on_to_the_same_bits(
    tmp_path: Path, script: Path
) -> None:
    pixels, labels = bars()
    save_bank(make_bank(pixels[:, None], labels), tmp_path / "bank.safetensors")
    command = (
        f"--data {tmp_path}/bank.safetensors --widths 4 --blocks 1 --epochs 1 --batch 8 --ema 0.9 "
        "--threads 1 --log-steps 4 --device cpu --checkpoint-seconds 0 --out"
    ).split()
    killed, once = tmp_path / "killed", tmp_path / "once"
    kills = killed_at_every_write(script, "train", [*command, str(killed)])
    assert kills > 40, "every write of the model, too"
    assert run("train", *command, once).exit_code == 0
    assert (killed / "weights.safetensors").read_bytes() == (
        once / "weights.safetensors"
    ).read_bytes()
    assert (killed / "model.yaml").read_bytes() == (once / "model.yaml").read_bytes()
    logs = [np.genfromtxt(of / "loss.csv", delimiter=",", names=True) for of in (killed, once)]
    for name in ("step", "epoch", "loss", "rate"):
        np.testing.assert_array_equal(logs[0][name], logs[1][name])
    assert logs[0]["step"].tolist() == [4, 6]
    records = [read_json(of / "training.json", "command", "seconds") for of in (killed, once)]
    assert records[0] == records[1]


@pytest.mark.slow
def test_a_calibration_killed_at_every_write_in_turn_goes_on_to_the_same_bits(
    tmp_path: Path, script: Path
) -> None:
    write_network(tmp_path / "models" / "net")
    write_bank(tmp_path / "models" / "_banks" / "squares.safetensors")
    command = (
        f"{tmp_path}/models/net --bank {tmp_path}/models/_banks/squares.safetensors --samples 2 "
        "--steps 2 --windows 3,5 --device cpu --threads 1 --out"
    ).split()
    killed, once = tmp_path / "models" / "killed", tmp_path / "models" / "once"
    kills = killed_at_every_write(script, "calibrate", [*command, str(killed)])
    assert kills > 15, "every write of table, record and model, too"
    assert run("calibrate", *command, once).exit_code == 0
    for name in ("windows.yaml", "model.yaml"):
        assert (killed / name).read_bytes() == (once / name).read_bytes()
    records = [read_json(of / "calibration.json", "command") for of in (killed, once)]
    assert records[0] == records[1]
    left = {path.name for path in killed.iterdir() if path.suffix != ".tmp"}
    assert left == {"windows.yaml", "calibration.json", "model.yaml"}
