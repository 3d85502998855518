"""Comparison: agreement, windows, refusals, the figure, runs that go on, both commands."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.support.commands import SEPARATE, run
from tests.support.comparing import (
    LABELS,
    SHAPE,
    pretended,
    squares,
    subjects,
    write_bank,
    write_network,
)

from els_service.cli.compare import lines
from els_service.denoisers.base import Denoised, Denoiser, Query
from els_service.denoisers.closed_forms import GaussianDenoiser
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import Options, sample
from els_service.denoisers.windows import WindowTable
from els_service.errors import ElsError, LoadError
from els_service.experiments.comparison.figure import cell_corner, draw_figure
from els_service.experiments.comparison.machines import build_machines
from els_service.experiments.comparison.run import FigureOptions, Settings, compare
from els_service.experiments.comparison.subjects import Windows, open_network

SMALL = Settings(count=4, network_steps=(3,), machine_steps=3)
TABLE = "sigma: [0.1, 1.0]\nk: [3, 5]\n"


def samples(out: Path, name: str) -> torch.Tensor:
    return load_file(out / "samples" / f"{name}.safetensors")["images"]


def record(out: Path) -> dict[str, Any]:
    """What is written, without what differs from run to run."""
    content: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return {
        name: value for name, value in content.items() if not name.startswith(("command", "sec"))
    }


def test_a_machine_compared_with_itself_agrees_entirely(tmp_path: Path) -> None:
    found = compare(subjects(squares(), None, "els", "ideal"), SMALL, tmp_path)
    els, ideal = found["machines"]["els"], found["machines"]["ideal"]
    assert els["median_pearson_r"] == pytest.approx(1, abs=1e-12)
    assert els["pearson_r_interval"] == pytest.approx([1, 1], abs=1e-12)
    assert els["median_explained"] == 1
    assert els["share_above_ideal"] == 1
    assert ideal["median_pearson_r"] < 0.99
    assert "share_above_ideal" not in ideal
    assert found == json.loads((tmp_path / "compare.json").read_text())


def test_two_gaussians_differ_by_the_offset_that_their_means_predict(tmp_path: Path) -> None:
    # D is affine in x and in the mean, so all samples differ by one number.
    bank = squares(labelled=False)
    ours, theirs = (
        GaussianDenoiser(SHAPE, torch.tensor(mean).double(), torch.tensor(0.3).double())
        for mean in (0.25, -0.25)
    )
    pair = replace(subjects(bank, None, "els"), network=pretended(ours), machines={"other": theirs})
    found = compare(pair, SMALL, tmp_path)["machines"]["other"]
    network, other = samples(tmp_path, "network-3"), samples(tmp_path, "other")
    offset = (network - other).double()
    assert offset.std() < 1e-6
    assert 0.05 < offset.mean() < 0.5
    np.testing.assert_allclose(found["pearson_r"], 1)
    variance = network.double().flatten(1).var(1, correction=0)
    np.testing.assert_allclose(found["explained"], 1 - offset.mean() ** 2 / variance, rtol=1e-4)


def test_all_start_from_the_same_noise_and_image_i_has_label_i_modulo_l(tmp_path: Path) -> None:
    network = open_network(str(write_network(tmp_path / "net")))
    bank = squares()
    machines = build_machines(["els"], bank, network.denoiser.info)
    both = replace(subjects(bank, None, "els"), network=network, machines=machines)
    settings = Settings(count=3, seed=5, network_steps=(4,), machine_steps=2)
    compare(both, settings, tmp_path / "out")
    for name, denoiser, steps in (
        ("network-4", network.denoiser, 4),
        ("els", machines["els"], 2),
    ):
        options = Options(steps=steps)
        *_, last = sample(denoiser, count=3, seed=5, options=options, labels=[0, 1, 0])
        torch.testing.assert_close(samples(tmp_path / "out", name), last.x.float())


def test_released_indexing_is_of_machines_alone(tmp_path: Path) -> None:
    one = subjects(squares(labelled=False), None, "els")
    compare(one, replace(SMALL, indexing="released"), tmp_path)
    options = Options(steps=3)
    for name, sampler in (("network-3", "ddim"), ("els", "ddim_released")):
        *_, last = sample(one.network.denoiser, count=4, sampler=sampler, options=options)
        torch.testing.assert_close(samples(tmp_path, name), last.x.float())


def test_the_figure_shows_noise_network_and_machines_in_this_order(tmp_path: Path) -> None:
    one = subjects(squares(labelled=False), None, "els", "local", "ideal")
    settings = replace(SMALL, network_steps=(3, 2))
    compare(one, settings, tmp_path, figure=FigureOptions(columns=2))
    noise = seeded_noise(0, 4, SHAPE)(0)
    rows = [noise / 3, *(samples(tmp_path, n) for n in ("network-3", "network-2", "els", "local"))]
    rows.append(samples(tmp_path, "ideal"))
    assert_shows(tmp_path / "compare.png", rows, columns=2)
    compare(one, settings, tmp_path, figure=FigureOptions(columns=9, hidden=("ideal",)))
    assert_shows(tmp_path / "compare.png", rows[:-1], columns=4)


def assert_shows(file: Path, rows: list[torch.Tensor], columns: int) -> None:
    picture = np.asarray(Image.open(file))
    height, width = SHAPE[1:]
    right, bottom = cell_corner(len(rows), columns, height, width)
    assert picture.shape == (bottom, right, 3)
    for row, of_row in enumerate(rows):
        assert (picture[cell_corner(row, 0, height, width)[1] :, :90] < 128).any(), "a name"
        for column in range(columns):
            left, top = cell_corner(row, column, height, width)
            cell = picture[top : top + 56, left : left + 56][3::7, 3::7]
            shown = of_row[column, 0].double().add(1).mul(127.5).round().clamp(0, 255).numpy()
            np.testing.assert_array_equal(cell, np.repeat(shown[..., None], 3, 2))


def test_three_channels_are_colours_and_of_others_the_first_is_shown() -> None:
    for channels, expected in ((3, [255, 128, 0]), (2, [255, 255, 255])):
        image = torch.tensor([1.0, 0.0, -1.0])[:channels, None, None].expand(channels, 4, 5)
        picture = Image.open(io.BytesIO(draw_figure({"row": image[None]})))
        left, top = cell_corner(0, 0, 4, 5)
        assert list(np.asarray(picture)[top + 1, left + 1]) == expected


_KILLED = """
import os, sys
from pathlib import Path
from tests.support.comparing import squares, subjects
from tests.denoisers.test_comparison import LONG
from els_service.experiments.comparison.run import compare

def reporter(title):
    def report(done, total):
        if title == "els" and done > 0.95 * total:
            os.kill(os.getpid(), 9)
    return report

compare(subjects(squares(labelled=False), None, "els", "ideal"), LONG, Path(sys.argv[1]),
        reporter=reporter)
"""
LONG = Settings(count=70, network_steps=(2,), machine_steps=2)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_images(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", _KILLED, str(tmp_path / "killed")]
    killed = subprocess.run(arguments, env={"PYTHONPATH": ":".join(sys.path)}, check=False)
    assert killed.returncode == -9
    # The first of two batches is kept.
    assert [len(samples(tmp_path / "killed", name)) for name in ("network-2", "els")] == [70, 64]
    both = subjects(squares(labelled=False), None, "els", "ideal")
    asked: list[int] = []
    counted = replace(both, machines={n: Counted(m, asked) for n, m in both.machines.items()})
    compare(counted, LONG, tmp_path / "killed")
    assert asked == [6, 6, 64, 64, 6, 6]
    compare(both, LONG, tmp_path / "whole")
    for name in ("network-2", "els", "ideal"):
        ours, whole = (samples(tmp_path / out, name) for out in ("killed", "whole"))
        assert torch.equal(ours, whole)
    assert record(tmp_path / "killed") == record(tmp_path / "whole")


class Counted:
    """A denoiser that writes down how many images it is asked for."""

    def __init__(self, denoiser: Denoiser, asked: list[int]) -> None:
        self._denoiser, self._asked = denoiser, asked
        self.info, self.check = denoiser.info, denoiser.check
        self.predict_seconds = denoiser.predict_seconds

    def denoise(self, query: Query) -> Denoised:
        self._asked.append(len(query))
        return self._denoiser.denoise(query)


def test_more_images_and_other_network_steps_draw_only_what_is_new(tmp_path: Path) -> None:
    one = subjects(squares(labelled=False), None, "els")
    asked: list[int] = []
    counted = replace(one, machines={"els": Counted(one.machines["els"], asked)})
    compare(counted, SMALL, tmp_path)
    compare(counted, replace(SMALL, count=6, network_steps=(5, 3)), tmp_path)
    found = compare(counted, replace(SMALL, count=5), tmp_path)
    assert asked == [4, 4, 4, 2, 2, 2]
    assert len(found["machines"]["els"]["pearson_r"]) == 5
    assert len(samples(tmp_path, "els")) == 6


def test_a_folder_of_another_run_is_refused_by_the_setting(tmp_path: Path) -> None:
    one = subjects(squares(labelled=False), None, "els")
    compare(one, SMALL, tmp_path)
    smaller = subjects(squares(labelled=False, images=20), None, "els")
    wider = subjects(squares(labelled=False), WindowTable.constant(5), "els")
    for again, settings, expected in (
        (one, replace(SMALL, seed=1), "seed: expected 0 as begun, got 1"),
        (one, replace(SMALL, machine_steps=2), "steps: expected 3 as begun, got 2"),
        (replace(one, bank=smaller.bank), SMALL, "bank: expected"),
        (replace(one, machines=wider.machines), SMALL, "windows: expected"),
    ):
        with pytest.raises(LoadError, match=expected):
            compare(again, settings, tmp_path)
    (tmp_path / "samples" / "els.safetensors").write_bytes(b"torn")
    with pytest.raises(LoadError, match=r"els\.safetensors: expected images of a comparison"):
        compare(one, SMALL, tmp_path)


def test_the_record_says_which_table_each_machine_had(tmp_path: Path) -> None:
    bank = squares(labelled=False)
    one = subjects(bank, None, "els", "ideal", "pspc")
    pspc = Windows(WindowTable.constant(3), "constant")
    given = Windows(None, "auto", of_machines={"pspc": pspc})
    names = ("els", "ideal", "pspc")
    machines = build_machines(names, bank, one.network.denoiser.info, windows=given)
    found = compare(replace(one, windows=given, machines=machines), SMALL, tmp_path)
    assert found["windows"] == "auto"
    assert found["windows_by_machine"] == {"els": "auto", "pspc": "constant"}
    assert found["machines"]["pspc"]["windows"]["k"] == [3]
    assert found["machines"]["els"]["windows"]["k"] != [3]
    assert lines(found)[0] == "network pretended, windows auto, pspc constant"


def test_images_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    one = subjects(squares(labelled=False), None, "els")
    folder = write_network(tmp_path / "net", label_count=0)
    tensors = load_file(folder / "weights.safetensors")
    tensors["body.up.weight"].fill_(1e38)
    save_file(tensors, folder / "weights.safetensors")
    with pytest.raises(ElsError, match="the network returned NaN or infinity in float32"):
        compare(replace(one, network=open_network(str(folder))), SMALL, tmp_path / "out")


@pytest.mark.slow
def test_what_does_not_go_together_is_refused_by_name(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "bank.safetensors")
    bare = write_bank(tmp_path / "bare.safetensors", squares(labelled=False))
    wide = write_bank(tmp_path / "wide.safetensors", squares(shape=(3, 8, 8)))
    net = write_network(tmp_path / "net")
    many = write_network(tmp_path / "many", label_count=5)
    broken = shutil.copytree(net, tmp_path / "broken")
    tensors = load_file(broken / "weights.safetensors")
    tensors["body.up.bias"][0] = torch.nan
    save_file(tensors, broken / "weights.safetensors")
    for network, images, extra, expected in (
        (net, wide, [], "bank: expected images of shape [1, 8, 8] as the network's, got [3, 8, 8]"),
        (net, bare, [], "bank: expected images of all 2 labels of the conditional network, got an"),
        (many, bank, [], "got none of [2, 3, 4]"),
        (broken, bank, [], "body.up.bias: expected finite numbers, got NaN"),
        (tmp_path / "no", bank, [], "network: expected a model in"),
        (bank.parent, bank, [], "model.yaml"),
        (net, tmp_path / "no.safetensors", [], "no.safetensors"),
        (net, bank, ["--machines", "els,elz"], "machines: expected some of"),
        (net, bank, ["--machines", "local-valid"], "machines: expected some of"),
        (net, bank, ["--machines", "els,els"], "machines: expected at least one, each once"),
        (net, bank, ["--figure-without", "local", "--machines", "els"], "figure-without: expected"),
        (net, bank, ["--network-steps", "3,3"], "network-steps: expected numbers, each once"),
        (net, bank, ["--steps", "1", "--indexing", "released"], "steps: expected at least 2"),
        (net, bank, ["--windows", "4"], "windows: expected an odd number, got 4"),
        (net, bank, ["--windows", "els=3,4"], "windows: expected one table, then MACHINE=TABLE"),
        (net, bank, ["--windows", "ideal=3"], "windows: expected tables of machines with windows"),
        (net, bank, ["--thresholds", "els=0.1"], "thresholds: expected one table"),
        (net, bank, ["--smoothing", "-1"], "smoothing: expected a number, 0 or more, got -1"),
        (net, bank, ["--draws", "0"], "draws: expected a whole number above 0, got 0"),
        (net, bank, ["--draws", "2000"], "draws: expected 1 to 1024, got 2000"),
        (net, bank, ["--seed", "-1"], "seed: expected"),
        (net, bank, ["--protocols", "paper,x"], "protocols: expected some of paper, ten-steps"),
        (net, bank, ["--protocols", "paper", "--steps", "9"], "steps: expected none beside"),
        (net, bank, ["--threads", "-1"], "threads: expected"),
    ):
        arguments = ("--network", network, "--bank", images, *extra)
        result = run("compare", *arguments, "--out", tmp_path / "out")
        assert (result.exit_code, expected in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()


def test_each_protocol_has_its_own_steps_of_network_and_machines(tmp_path: Path) -> None:
    one = subjects(squares(labelled=False), None, "els")
    settings = Settings.of_protocols(("ten-steps", "paper"), count=2)
    found = compare(one, settings, tmp_path)
    assert (settings.network_steps, settings.machine_steps) == ((10,), 10)
    assert found["seconds_per_step"].keys() == {
        *("network-10", "network-20", "network-150"),
        *("els", "els-20"),
    }
    paper, later = found["protocols"]["paper"], found["protocols"]["ten-steps"]
    assert later["at_network_steps"] == found["at_network_steps"]
    # The network is the same machine, so it agrees entirely at equal numbers of steps alone.
    at_20, at_150 = (paper["at_network_steps"][steps]["els"] for steps in ("20", "150"))
    assert at_20["mean_mse"] == 0 < at_150["mean_mse"]
    want = (samples(tmp_path, "network-150") - samples(tmp_path, "els-20")).double() / 2
    assert at_150["mean_mse"] == pytest.approx(want.square().mean().item(), rel=1e-6)
    assert at_150["mean_explained"] == pytest.approx(np.mean(at_150["explained"]))
    assert lines(found)[1] == "protocol ten-steps, machines at 10 steps"
    assert "explained 1.000 (mean 1.000), MSE 0.0000" in lines(found)[2]


@pytest.mark.slow
def test_the_command_agrees_with_itself_without_the_packages_of_the_server(tmp_path: Path) -> None:
    write_network(tmp_path / "models" / "net" / "2")
    write_network(tmp_path / "models" / "net" / "1", padding="circular")
    (tmp_path / "models" / "net" / "2" / "windows.yaml").write_text(TABLE)
    bank = write_bank(tmp_path / "bank.safetensors")
    given = f"--network net --models {tmp_path}/models --machines els,local,ideal --bank {bank}"
    given += " --count 3 --steps 2 --network-steps 2,4 --seed 0 --device cpu --threads 1 --out"
    result = run("compare", *given.split(), tmp_path / "ours")
    assert result.exit_code == 0, result.output
    assert "network at 4 steps: median r" in result.output
    shown = subprocess.run(
        [sys.executable, "-c", SEPARATE, "compare", *given.split(), str(tmp_path / "theirs")],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "100%" in shown.stderr
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert record(ours) == record(theirs)
    assert (ours / "compare.png").read_bytes() == (theirs / "compare.png").read_bytes()
    found = record(ours)
    assert found["network"]["padding"] == found["machines"]["els"]["padding"] == "zeros"
    assert found["machines"]["els"]["windows"]["k"] == [3, 5]
    assert found["machines"] != found["at_network_steps"]["4"]
    assert set(found["at_network_steps"]) == {"2", "4"}
    assert 0 <= found["machines"]["els"]["share_above_ideal"] <= 1
    assert found["network"]["label_count"] == LABELS
    helped = run("compare", "--help")
    assert (helped.exit_code, "--figure-without" in helped.output) == (0, True)
