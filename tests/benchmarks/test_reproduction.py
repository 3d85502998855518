"""The table beside published figures, the verdicts, and the page that shows both."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.reproduction.__main__ import main
from benchmarks.reproduction.page import BEGIN, END, generated, newest, parts_of
from benchmarks.reproduction.published import PAPER
from benchmarks.reproduction.statements import Verdict, verdicts
from tests.support.comparing import squares, subjects, write_network

from els_service.experiments.comparison.run import Settings, compare

SETTINGS = Settings(count=3, network_steps=(150, 20), machine_steps=2)
PAGE = Path(__file__).parents[2] / "docs" / "claim.md"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real one, apart from its description of the network."""
    out = tmp_path_factory.mktemp("comparison")
    return renamed(compare(subjects(squares(), None, "els", "local", "ideal"), SETTINGS, out), out)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real comparison in both protocols, apart from its description of the network."""
    out = tmp_path_factory.mktemp("both")
    settings = Settings.of_protocols(("paper", "ten-steps"), count=3)
    return renamed(compare(subjects(squares(), None, "els", "wiener"), settings, out), out)


def renamed(found: dict[str, Any], out: Path, **network: Any) -> Path:
    """Write a comparison with another description of the network; return its file."""
    found = deepcopy(found)
    labels = {"architecture": "resnet", "parameters": 221_000, "label_count": 10}
    found["network"] |= labels | network
    (out / "compare.json").write_text(json.dumps(found))
    return out / "compare.json"


def written(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    out = tmp_path / "claim.json"
    main([*arguments, "--dirty", "--out", str(out)])
    return json.loads(out.read_text()), out.with_suffix(".md").read_text()


@pytest.mark.slow
def test_a_row_a_network_and_machine_and_the_rest_is_not_yet_run(
    tmp_path: Path, comparison: Path
) -> None:
    record, text = written(tmp_path, f"FMNIST={comparison}", "--note", "Tried: nothing else.")
    rows = record["rows"]
    assert len(rows) == len(PAPER) == 11
    (had,) = [row for row in rows if row["ours"]]
    assert had["paper"]["els"] == [0.94, 0.90]
    ours = had["ours"][0]
    els = ours["at_network_steps"]["150"]["els"]
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    found = {line[1]: line for line in lines if "`pretended`" in line[0]}
    assert list(found) == ["ELS", "LS", "IS"]
    low, high = els["pearson_r_interval"]
    assert found["ELS"][2] == f"{els['median_pearson_r']:.3f} [{low:.3f}, {high:.3f}]"
    assert found["ELS"][4].startswith("0.94 / 0.90 (")
    assert f"({els['median_pearson_r'] - 0.94:+.3f} / " in found["ELS"][4]
    assert found["ELS"][5:] == ["–", "–", "–", "– |"]
    assert "FMNIST resnet zeros, with labels; 221,000 parameters; 3 images, bank of 24" in text
    assert "Not yet run: MNIST unet zeros, no labels; FMNIST unet zeros, with labels; MNIST" in text
    assert "Not yet run, for want of a GPU: CIFAR10 unet zeros, with labels; CIFAR10 resnet" in text
    assert "for want of a GPU: FMNIST resnet zeros, with labels." in text
    assert "faces is not available: CelebA unet zeros, no labels; CelebA resnet" in text
    assert "- Tried: nothing else." in text
    assert "All measures" not in text
    figure = tmp_path / "claim-pretended.png"
    assert figure.read_bytes() == comparison.with_name("compare.png").read_bytes()


@pytest.mark.slow
def test_both_protocols_published_figures_and_seconds_stand_in_one_row(
    tmp_path: Path, both: Path
) -> None:
    record, text = written(tmp_path, f"CIFAR10={both}")
    (ours,) = next(row["ours"] for row in record["rows"] if row["ours"])
    one = ours["protocols"]["ten-steps"]["at_network_steps"]["10"]["wiener"]
    low, high = one["mean_explained_interval"]
    (line,) = [line for line in text.splitlines() if line.startswith("| `pretended` | `wiener` |")]
    cells = line.split(" | ")
    assert cells[5] == f"{one['mean_explained']:.3f} [{low:.3f}, {high:.3f}]"
    assert cells[7] == "0.553, 0.008"
    seconds = ours["protocols"]["ten-steps"]["seconds_per_step"]["wiener"]
    assert cells[8] == f"{seconds:.3g} |"
    assert "| `pretended` | paper, 150 / 20 | wiener | " in text
    # The machine is the network itself: Wiener does not beat it.
    at = ours["differences"]["ten-steps"]["10"]["wiener - els"]["explained"]
    assert at[2] < 0
    assert at[0] == pytest.approx(one["mean_explained"] - 1)
    (verdict,) = [line for line in text.splitlines() if line.startswith("| Wiener (.553)")]
    assert verdict.split(" | ")[2].startswith("`pretended`: ")


def test_comparisons_of_a_network_are_merged_unless_a_machine_is_there_twice(
    tmp_path: Path, both: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings.of_protocols(("ten-steps",), count=3)
    others = replace(
        subjects(squares(), None, "els", "pca"), machines=subjects(squares(), None, "pca").machines
    )
    again = renamed(compare(others, settings, tmp_path), tmp_path)
    record, text = written(tmp_path, f"CIFAR10={both}", f"CIFAR10={again}")
    (ours,) = next(row["ours"] for row in record["rows"] if row["ours"])
    assert list(ours["protocols"]["ten-steps"]["at_network_steps"]["10"]) == [
        "els",
        "wiener",
        "pca",
    ]
    assert set(ours["differences"]["ten-steps"]["10"]) == {"wiener - els", "pca - els"}
    assert "| `pretended` | `pca` | – | – | – | " in text
    content = json.loads(again.read_text())
    content["protocols"]["ten-steps"]["at_network_steps"]["10"]["wiener"] = {"pearson_r": [0.0]}
    content["seconds_per_step"]["wiener"] = 1.0
    again.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        written(tmp_path, f"CIFAR10={both}", f"CIFAR10={again}")
    assert "expected each once, got two: ten-steps, " in capsys.readouterr().err


def test_networks_of_one_row_stand_together_and_one_of_the_paper_s_size_settles_it(
    tmp_path: Path, comparison: Path
) -> None:
    content = json.loads(comparison.read_text())
    wide = renamed(content, tmp_path, name="wide", parameters=4_000_000)
    record, text = written(tmp_path, f"FMNIST={comparison}", f"FMNIST={wide}")
    (row,) = [row for row in record["rows"] if row["ours"]]
    assert [ours["network"] for ours in row["ours"]] == ["pretended", "wide"]
    assert "paper's size, for want of a GPU" not in text


def test_other_networks_of_an_earlier_record_are_kept(tmp_path: Path, comparison: Path) -> None:
    content = json.loads(comparison.read_text())
    first = tmp_path / "first"
    first.mkdir()
    other = renamed(content, first, name="other", architecture="unet-attention")
    written(first, f"FMNIST={comparison}", f"FMNIST={other}")
    record, text = written(tmp_path, f"FMNIST={comparison}", "--earlier", str(first / "claim.json"))
    kept = [(ours["network"], ours.get("record")) for row in record["rows"] for ours in row["ours"]]
    assert kept == [("pretended", None), ("other", "claim.json")]
    assert "**`other`**: FMNIST unet-attention zeros, with labels" in text


def test_another_protocol_of_a_network_stands_beside_its_earlier_one(
    tmp_path: Path, both: Path
) -> None:
    content = json.loads(both.read_text())
    first = tmp_path / "first"
    first.mkdir()
    written(first, f"FMNIST={both}")
    later = content["protocols"]["ten-steps"]
    content |= {"count": content["count"] + 1, "protocols": {"ten-steps": later}}
    content |= {name: later[name] for name in ("machine_steps", "at_network_steps")}
    content["seconds_per_step"] = {"els": 1.0, "wiener": 1.0}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    record, _ = written(tmp_path, f"FMNIST={other}", "--earlier", str(first / "claim.json"))
    found = [ours for row in record["rows"] for ours in row["ours"]]
    assert [list(ours["protocols"]) for ours in found] == [["ten-steps"], ["paper"]]
    assert [list(ours["at_network_steps"]) for ours in found] == [["10"], ["20", "150"]]
    assert [ours.get("record") for ours in found] == [None, "claim.json"]


def test_conditions_of_training_and_calibration_are_recorded(
    tmp_path: Path, comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_network(tmp_path / "trained" / "pretended")
    training = {"command": "els-server train --seed 0", "step": 5, "steps": 5, "seconds": 7200.0}
    (folder / "training.json").write_text(json.dumps(training | {"loss": 0.0625}))
    given = ("--trained", str(tmp_path / "trained"))
    with pytest.raises(SystemExit):
        written(tmp_path, f"FMNIST={comparison}", *given)
    assert "trained: expected weights pretended's of the compared" in capsys.readouterr().err
    content = json.loads(comparison.read_text())
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    same = renamed(content, tmp_path, fingerprint=digest)
    fitted = tmp_path / "trained" / "pretended-els"
    fitted.mkdir()
    calibration = {"network": {"fingerprint": digest}, "bank": {"images": 9}, "machine": "els"}
    (fitted / "calibration.json").write_text(json.dumps(calibration | {"command": "c", "seed": 1}))
    record, text = written(tmp_path, f"FMNIST={same}", *given)
    (ours,) = next(row["ours"] for row in record["rows"] if row["ours"])
    assert ours["training"]["loss"] == 0.0625
    assert ours["calibrations"] == [
        {"folder": "pretended-els", "machine": "els", "command": "c", "seed": 1, "bank_images": 9}
    ]
    assert "| 5 of 5 | 0.0625 | 2.0 | `els-server train --seed 0` |" in text


def figures(r: float, width: float = 0.01) -> dict[str, Any]:
    return {"median_pearson_r": r, "pearson_r_interval": [r - width, r + width]}


def one_row(network: str, architecture: str = "resnet", **machines: Any) -> dict[str, Any]:
    paper = {"els": [0.95, 0.90]} if architecture == "resnet" else None
    ours = {"network": network, "at_network_steps": {"150": machines}, "protocols": {}}
    described = {"data": "CIFAR10", "architecture": architecture, "padding": "zeros"}
    return described | {"paper": paper, "ours": [ours]}


def verdict_of(found: list[Verdict], text: str) -> str:
    return next(one.verdict for one in found if text in one.statement)


@pytest.mark.parametrize(
    ("els", "reached"), [(0.96, "holds"), (0.90, "does not hold"), (0.95, "open")]
)
def test_a_published_median_holds_where_the_interval_lies_above_it(
    els: float, reached: str
) -> None:
    found = verdicts([one_row("net", els=figures(els))])
    assert verdict_of(found, "a median r of 0.95 on CIFAR10 resnet zeros, 150 steps") == reached


@pytest.mark.parametrize(
    ("local", "verdict"), [(0.85, "holds"), (0.95, "does not hold"), (0.91, "open")]
)
def test_an_order_is_open_where_intervals_overlap_and_no_difference_decides(
    local: float, verdict: str
) -> None:
    row = one_row("net", els=figures(0.9), local=figures(local))
    assert verdict_of(verdicts([row]), "closer to the network than LS, 150") == verdict
    # The same images decide more.
    row["ours"][0]["protocols"]["paper"] = row["ours"][0]
    between = {"pearson_r": [0.02, 0.01, 0.03]}
    row["ours"][0] |= {"differences": {"paper": {"150": {"els - local": between}}}}
    assert verdict_of(verdicts([row]), "closer to the network than LS, 150") == "holds"


def test_attention_is_judged_on_a_pair_of_networks() -> None:
    rows = [
        one_row("net-8", "unet", els=figures(0.9)),
        one_row("net-attention-8", "unet-attention", els=figures(0.8)),
    ]
    (found,) = [one for one in verdicts(rows) if "attention" in one.statement]
    assert (found.network, found.verdict) == ("net-attention-8", "holds")
    assert "0.800 [0.790, 0.810] against 0.900 [0.890, 0.910] of `net-8`" in found.numbers


def test_the_page_has_what_the_newest_record_says() -> None:
    between = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    assert between.strip() == generated(newest(), PAGE)


def test_only_the_generated_part_of_a_page_is_replaced(tmp_path: Path, comparison: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nreplaced\n{END}\nafter\n")
    written(tmp_path, f"FMNIST={comparison}", "--page", str(page))
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\nFrom [claim.json](claim.json)")
    assert text.endswith(f"{END}\nafter\n")
    assert '<img src="claim-pretended.png"' in text
    assert "replaced" not in text
    main(["--page", str(page)])
    assert newest().name in page.read_text()
    page.write_text("none")
    with pytest.raises(ValueError, match="expected one part from"):
        parts_of(page)


@pytest.mark.parametrize("arguments", [["KMNIST=x"], ["MNIST=nowhere"], ["MNIST"], []])
def test_what_is_no_comparison_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "expected" in capsys.readouterr().err
