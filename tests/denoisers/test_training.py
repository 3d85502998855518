"""Training: lowers the loss, repeats itself by seed, survives a kill, and refuses by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.support.commands import SEPARATE, run
from tests.support.networks import config
from tests.support.training import IMAGES, bars
from torch import Tensor

from els_service.denoisers.banks import Bank, make_bank, save_bank
from els_service.denoisers.networks import PREDICTIONS
from els_service.errors import ElsError, InvalidArgumentError, LoadError
from els_service.experiments.training import Limits, TrainingSettings, train
from els_service.experiments.training.data import Batches
from els_service.experiments.training.record import read_log
from els_service.repository import ModelRepository, load_network_folder

SHAPE = (1, 8, 8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bank() -> Bank:
    pixels, labels = bars()
    return make_bank(pixels[:, None], labels, label_names=("flat", "tall"), licence="CC0")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On networks so small, threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**fields: Any) -> TrainingSettings:
    network = {"shape": SHAPE, "label_count": 2, "null_label": False} | fields.pop("network", {})
    defaults: dict[str, Any] = {"epochs": 2, "batch": 8, "rate": 3e-3}
    return TrainingSettings(network=config(**network), **defaults | fields)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "weights.safetensors")


def assert_same(got: Path, want: Path) -> None:
    ours, theirs = weights(got), weights(want)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_a_model_that_serves(
    tmp_path: Path, bank: Bank
) -> None:
    asked = settings(epochs=40, schedule="one-cycle", network={"label_names": bank.label_names})
    reported = []
    outcome = train(
        asked,
        bank,
        tmp_path / "bars",
        limits=Limits(log_steps=20),
        command="as told",
        report=lambda row, steps: reported.append((row.step, steps)),
    )
    rows = read_log(tmp_path / "bars", outcome.steps)
    assert outcome.finished
    assert outcome.steps == 40 * IMAGES / 8
    assert [(row.step, outcome.steps) for row in rows] == reported
    assert np.mean([row.loss for row in rows[-4:]]) < 0.5 * rows[0].loss
    info = ModelRepository(tmp_path).load("bars").info
    assert (info.kind, info.label_names) == ("network", ("flat", "tall"))
    assert info.bank is not None
    assert (info.bank.fingerprint, info.bank.licence) == (bank.fingerprint, "CC0")
    record = json.loads((tmp_path / "bars" / "training.json").read_text())
    assert (record["command"], record["step"], record["settings"]["seed"]) == ("as told", 240, 0)
    assert record["data"]["fingerprint"] == bank.fingerprint
    with Image.open(tmp_path / "bars" / "loss.png") as plot:
        assert len(plot.convert("RGB").getcolors() or ()) >= 3


@pytest.mark.slow
def test_a_seed_names_a_network_and_another_seed_another(tmp_path: Path, bank: Bank) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(settings(seed=seed), bank, tmp_path / name)
    assert_same(tmp_path / "a", tmp_path / "b")
    ours, others = weights(tmp_path / "a"), weights(tmp_path / "c")
    assert not any(torch.equal(ours[name], others[name]) for name in ours if "weight" in name)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, bank: Bank) -> None:
    save_bank(bank, tmp_path / "bank.safetensors")
    command = (
        f"--data {tmp_path}/bank.safetensors --widths 8 --epochs 10 --batch 8 --lr 3e-3 --ema 0.9 "
        "--label-dropout 0.2 --rate-schedule one-cycle --threads 1 --log-steps 7 "
        "--device cpu --out"
    ).split()
    killed, whole = str(tmp_path / "killed"), str(tmp_path / "whole")
    arguments = [
        sys.executable,
        "-c",
        SEPARATE,
        "train",
        "--checkpoint-seconds",
        "0",
        *command,
        killed,
    ]
    with subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    ) as process:
        assert process.stderr is not None
        shown = [process.stderr.readline() for _ in range(2)]
        process.kill()
    assert "step 14/60" in shown[1], shown
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    resumed = run("train", *command, killed)
    assert (resumed.exit_code, "step 7/60" in resumed.stderr) == (0, False)
    assert run("train", *command, whole).exit_code == 0
    assert_same(tmp_path / "killed", tmp_path / "whole")
    logs = [
        [(row.step, row.loss) for row in read_log(tmp_path / name, 60)]
        for name in ("killed", "whole")
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_a_run_that_pauses_goes_on_to_the_same_bits_and_serves_meanwhile(
    tmp_path: Path, bank: Bank
) -> None:
    asked = settings(epochs=0.7, schedule="constant", network={"padding": "circular"})
    paused = tmp_path / "paused"
    calls = 1  # of a step each
    while not train(asked, bank, paused, limits=Limits(seconds=0)).finished:
        assert load_network_folder(paused).info.padding == "circular"
        calls += 1
    train(asked, bank, tmp_path / "whole")
    assert calls == asked.steps(IMAGES)
    assert_same(paused, tmp_path / "whole")
    assert train(asked, bank, paused).finished  # again, and nothing happens
    assert_same(paused, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet", "unet", "unet-attention"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_architecture_trains_in_every_precision(
    tmp_path: Path, bank: Bank, architecture: str, precision: str
) -> None:
    asked = settings(
        epochs=4, precision=precision, network={"architecture": architecture}, schedule="constant"
    )
    train(asked, bank, tmp_path, limits=Limits(log_steps=8))
    first, *_, last = read_log(tmp_path, 1000)
    assert last.loss < 0.97 * first.loss


def test_a_network_without_labels_trains_on_unlabelled_images(tmp_path: Path) -> None:
    bank = make_bank(bars()[0][:, None])
    train(settings(network={"label_count": 0}), bank, tmp_path)
    assert load_network_folder(tmp_path).info.label_count == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_are_what_turns_into_the_clean_image_and_of_size_one(
    bank: Bank, prediction: str
) -> None:
    asked = settings(batch=IMAGES, network={"prediction": prediction})
    batch = Batches(bank, asked, CPU)(0)
    assert batch.x.shape == batch.target.shape == (IMAGES, *SHAPE)
    assert 0.3 < float(batch.target.std()) < 2
    if prediction == "x0":
        assert set(batch.target.flatten().tolist()) == {-1.0, 1.0}
    if prediction == "eps":
        assert float(batch.target.std()) == pytest.approx(1, abs=0.05)


def test_every_epoch_shows_every_image_once_in_another_order(bank: Bank) -> None:
    batches = Batches(bank, settings(batch=9), CPU)
    row = np.concatenate([batches._chosen(step) for step in range(16)])
    epochs = row.reshape(3, IMAGES)
    for epoch in epochs:
        assert sorted(epoch) == list(range(IMAGES))
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_batch_may_be_larger_than_the_data(bank: Bank) -> None:
    chosen = Batches(bank, settings(batch=100), CPU)._chosen(3)
    assert np.bincount(chosen).min() >= 1
    assert len(chosen) == 100


def test_labels_are_withheld_as_often_as_told(bank: Bank) -> None:
    asked = settings(batch=2000, label_dropout=0.25, network={"null_label": True})
    labels = Batches(bank, asked, CPU)(0).labels
    assert float((labels == 2).float().mean()) == pytest.approx(0.25, abs=0.04)


def test_rates_are_those_of_their_names() -> None:
    one_cycle = [settings(schedule="one-cycle").rate_at(i, 100) for i in range(101)]
    assert max(one_cycle) == one_cycle[30] == pytest.approx(3e-3)
    assert one_cycle[0] == pytest.approx(3e-3 / 25)
    assert one_cycle[100] == pytest.approx(3e-7)
    assert settings(schedule="decay").rate_at(1000, 1) == pytest.approx(3e-3 * 0.999965**1000)
    assert settings(schedule="constant").rate_at(77, 100) == 3e-3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 5}, "seed: expected 0 as begun, got 5"),
        ({"batch": 4}, "batch: expected 8 as begun, got 4"),
        ({"network": {"padding": "circular"}}, "network: expected"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    tmp_path: Path, bank: Bank, change: dict[str, Any], expected: str
) -> None:
    train(settings(), bank, tmp_path)
    with pytest.raises(LoadError, match=r"checkpoint\.safetensors") as error:
        train(settings(**change), bank, tmp_path)
    assert expected in str(error.value)


def test_a_run_does_not_go_on_with_other_data_or_from_a_damaged_checkpoint(
    tmp_path: Path, bank: Bank
) -> None:
    train(settings(), bank, tmp_path)
    with pytest.raises(LoadError, match="data: expected"):
        train(settings(), replace(bank, images=255 - bank.images), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1], b"", b"\x80\x04.", (tmp_path / "weights.safetensors").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(LoadError, match=r"checkpoint\.safetensors: expected a checkpoint"):
            train(settings(), bank, tmp_path)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, bank: Bank) -> None:
    train(settings(), bank, tmp_path, limits=Limits(seconds=1e-9))
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as checkpoint:
        metadata = checkpoint.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["network/body.up.weight"].fill_(float("inf"))
    save_file(tensors, path, metadata)
    with pytest.raises(ElsError, match="loss: expected a finite number, got"):
        train(settings(), bank, tmp_path)


def test_sizes_and_settings_that_do_not_fit_are_refused(tmp_path: Path, bank: Bank) -> None:
    save_bank(bank, path := tmp_path / "bank.safetensors")
    for extra, expected in (
        (["--arch", "unet", "--widths", "4,4,4,4,4"], "shape: expected height and width divisible"),
        (["--batch", "0"], "batch: expected"),
        (["--precision", "tf32", "--device", "cpu"], "precision: expected"),
        (["--widths", "8", "--ema", "1"], "ema: expected"),
        (["--threads", "-1"], "threads: expected 0 or more, got -1"),
        (["--label-dropout", "1"], "label_dropout: expected 0 to less than 1, got 1.0"),
    ):
        result = run("train", "--data", path, "--out", tmp_path / "out", *extra)
        assert (result.exit_code, expected in result.stderr) == (2, True), result.stderr
    with pytest.raises(InvalidArgumentError, match="data: expected images of shape"):
        train(settings(network={"shape": (1, 4, 4)}), bank, tmp_path / "out")
    with pytest.raises(InvalidArgumentError, match="label_dropout"):
        settings(label_dropout=0.5)
    with pytest.raises(InvalidArgumentError, match="seconds: expected at least 0, got nan"):
        Limits(seconds=float("nan"))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("resize", "abc", "a whole number above 0"),
        ("resize", "8x", "a whole number above 0"),
        ("widths", "8,", "a whole number above 0"),
        ("log-steps", "0", "a whole number above 0"),
        ("limit", "0", "a whole number above 0"),
        ("minutes", "-1", "a number, 0 or more"),
        ("minutes", "soon", "a number, 0 or more"),
        ("checkpoint-seconds", "nan", "a number, 0 or more"),
    ],
)
def test_an_option_that_is_no_number_is_named(option: str, value: str, expected: str) -> None:
    result = run("train", "--data", "x", "--out", "y", f"--{option}={value}")
    assert result.exit_code == 2
    assert f"{option}: expected {expected}, got" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_model_without_its_checkpoint_is_not_overwritten(tmp_path: Path, bank: Bank) -> None:
    for name in ("model.yaml", "weights.safetensors", "windows.yaml", "1/model.yaml"):
        path = tmp_path / name.partition(".")[0] / name
        path.parent.mkdir(parents=True)
        path.write_text("another's")
        with pytest.raises(LoadError, match=f"{name}: expected no model, or one with its"):
            train(settings(), bank, tmp_path / name.partition(".")[0])
        assert path.read_text() == "another's"
        assert len(list(path.parent.iterdir())) == 1


def test_who_interrupts_a_run_is_told_how_to_go_on(
    tmp_path: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    save_bank(bank, tmp_path / "bank.safetensors")
    monkeypatch.setattr(Batches, "__call__", interrupted)
    arguments = ["--data", f"{tmp_path}/bank.safetensors", "--out", f"{tmp_path}/out"]
    result = run("train", *arguments, "--widths", "8", "--device", "cpu")
    assert result.exit_code == 130
    assert "interrupted: the same command resumes it" in result.stderr


def test_the_server_s_command_trains_too(tmp_path: Path, bank: Bank) -> None:
    save_bank(bank, path := tmp_path / "bank.safetensors")
    arguments = ("train", "--data", path, "--out", tmp_path / "out", "--widths", "8")
    options = ["--epochs", "1", "--batch", "16", "--store", "float16", "--device", "cpu"]
    result = run(*arguments, *options)
    assert result.exit_code == 0, result.output
    assert weights(tmp_path / "out")["body.up.weight"].dtype == torch.float16
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["command"].startswith("els-server train --data ")
    shown = run("train", "--help")
    assert (shown.exit_code, "--checkpoint-seconds" in shown.output) == (0, True)
