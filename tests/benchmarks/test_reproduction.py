"""The table beside the paper's: rows by kind of network, those not yet run, differences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.reproduction import PAPER, main
from tests.support.comparing import squares, subjects

from els_service.experiments.comparison.run import Settings, compare

SETTINGS = Settings(count=3, network_steps=(150, 20), machine_steps=2)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real one, but for what it says of the network."""
    out = tmp_path_factory.mktemp("comparison")
    found = compare(subjects(squares(), None, "els", "local", "ideal"), SETTINGS, out)
    found["network"] |= {"architecture": "resnet", "parameters": 221_000, "label_count": 10}
    (out / "compare.json").write_text(json.dumps(found))
    return out / "compare.json"


def written(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    out = tmp_path / "claim.json"
    main([*arguments, "--dirty", "--out", str(out)])
    return json.loads(out.read_text()), out.with_suffix(".md").read_text()


def test_a_comparison_stands_beside_its_row_and_the_rest_is_not_yet_run(
    tmp_path: Path, comparison: Path
) -> None:
    record, text = written(tmp_path, f"FMNIST={comparison}", "--note", "Tried: nothing else.")
    rows = record["rows"]
    assert len(rows) == len(PAPER) == 11
    (had,) = [row for row in rows if row["ours"]]
    assert had["paper"]["els"] == [0.94, 0.90]
    els = had["ours"][0]["at_network_steps"]["150"]["els"]
    lines = text.splitlines()
    at = lines.index("| **FMNIST resnet zeros, with labels**: paper | | | 0.94 / 0.90 | "
                     "0.88 / 0.88 | 0.68 / 0.74 | | |")  # fmt: skip
    assert f"{els['median_pearson_r']:.3f} [" in lines[at + 1]
    assert f"{els['median_pearson_r'] - 0.94:+.3f} / " in lines[at + 1]
    assert "221,000, told | 3 of 24" in lines[at + 1]
    assert text.count("| ours | not yet run |") == 10
    assert "Not yet run: MNIST unet zeros, no labels; FMNIST unet zeros, with labels; MNIST" in text
    assert "Not yet run, for want of a GPU: CIFAR10 unet zeros, with labels; CIFAR10 resnet" in text
    assert "for want of a GPU: FMNIST resnet zeros, with labels." in text
    assert "faces is not available: CelebA unet zeros, no labels; CelebA resnet" in text
    assert lines[-1] == "- Tried: nothing else."


def test_a_network_of_another_kind_has_a_row_of_its_own(tmp_path: Path, comparison: Path) -> None:
    _, text = written(tmp_path, f"MNIST={comparison}")
    assert "**MNIST resnet zeros, with labels**, no row of the paper: ours: " in text
    assert text.count("| ours | not yet run |") == 11


def test_networks_of_one_row_stand_together_and_one_of_the_paper_s_size_settles_it(
    tmp_path: Path, comparison: Path
) -> None:
    found = json.loads(comparison.read_text())
    found["network"] |= {"name": "wide", "parameters": 4_000_000}
    (tmp_path / "wide.json").write_text(json.dumps(found))
    record, text = written(tmp_path, f"FMNIST={comparison}", f"FMNIST={tmp_path}/wide.json")
    (row,) = [row for row in record["rows"] if row["ours"]]
    assert len(row["ours"]) == 2
    lines = text.splitlines()
    (second,) = [i for i, line in enumerate(lines) if line.startswith("| ours: wide | 4,000,000")]
    assert "221,000" in lines[second - 1]
    assert "paper's size, for want of a GPU" not in text


def test_machines_and_steps_that_were_not_tried_are_dashes(
    tmp_path: Path, comparison: Path
) -> None:
    found = compare(
        subjects(squares(), None, "els"), replace(SETTINGS, network_steps=(20,)), tmp_path / "els"
    )
    found["network"] = json.loads(comparison.read_text())["network"]
    (tmp_path / "few.json").write_text(json.dumps(found))
    _, text = written(tmp_path, f"FMNIST={tmp_path}/few.json")
    (line,) = [line for line in text.splitlines() if "221,000" in line]
    median = found["machines"]["els"]["median_pearson_r"]
    low, high = found["machines"]["els"]["pearson_r_interval"]
    assert line.split(" | ")[3:] == [
        f"– / {median:.3f} [{low:.3f}, {high:.3f}]",
        "– / –",
        "– / –",
        "– / –",
        f"– / {median - 0.9:+.3f} |",
    ]


def test_all_measures_of_both_protocols_stand_in_a_second_table(
    tmp_path: Path, comparison: Path
) -> None:
    settings = Settings.of_protocols(("paper", "ten-steps"), count=2)
    found = compare(subjects(squares(), None, "els", "ideal"), settings, tmp_path / "both")
    found["network"] = json.loads(comparison.read_text())["network"]
    (tmp_path / "both.json").write_text(json.dumps(found))
    record, text = written(tmp_path, f"CIFAR10={tmp_path}/both.json")
    (ours,) = next(row["ours"] for row in record["rows"] if row["ours"])
    one = ours["protocols"]["ten-steps"]["at_network_steps"]["10"]["ideal"]
    low, high = one["mean_explained_interval"]
    lines = [line.split(" | ") for line in text.splitlines() if " / 10 | " in line]
    assert [line[2] for line in lines] == ["els", "ideal"]
    assert lines[1][6] == f"{one['mean_explained']:.3f} [{low:.3f}, {high:.3f}]"
    assert "paper, 150 / 20 | els | " in text
    assert "mean EV and MSE: ideal -0.401, 0.030; wiener 0.553, 0.008" in text
    assert "All measures" not in written(tmp_path, f"FMNIST={comparison}")[1]


@pytest.mark.parametrize("argument", ["KMNIST=x", "MNIST=nowhere", "MNIST"])
def test_what_is_no_comparison_is_refused(
    tmp_path: Path, argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([argument])
    assert "expected" in capsys.readouterr().err
