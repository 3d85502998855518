"""Model folders: what is a model, what each file may say, and how a bad one is refused by name."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.repository.malformed import BANK, ELS, GAUSSIAN, MALFORMED
from tests.support.models_folder import DOCUMENTS, tiny_bank, write_models

from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.bank_build_records import Request
from els_service.denoisers.bank_builds import build_parts
from els_service.denoisers.bank_selection import Source
from els_service.denoisers.banks import Bank, load_bank, save_bank
from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.windows import WindowTable, default_windows
from els_service.errors import LoadError
from els_service.repository import ModelRepository, bank_cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A models root with a bank and no model."""
    return write_models(tmp_path / "models", {})


def write(root: Path, document: str | bytes, name: str = "model") -> Path:
    """Write a model folder and return its model.yaml."""
    (root / name).mkdir(parents=True)
    path = root / name / "model.yaml"
    path.write_bytes(document if isinstance(document, bytes) else document.encode())
    return path


def load(root: Path, document: str, name: str = "model") -> Denoiser:
    write(root, document, name)
    return ModelRepository(root).load(name)


def refusal(root: Path, name: str = "model") -> LoadError:
    with pytest.raises(LoadError) as caught:
        ModelRepository(root).load(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 5000
    return caught.value


@pytest.mark.parametrize(("document", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_document_is_refused_by_name_with_its_fault(
    root: Path, document: str | bytes, reason: str
) -> None:
    path = write(root, document)
    error = refusal(root)
    assert error.path == str(path)
    assert reason in error.reason


OUTSIDE = ["../../secret", "link", "../linked/secret", "../../models/../secret"]


@pytest.mark.parametrize("bank", OUTSIDE)
@pytest.mark.parametrize("kind", ["analytic\nmachine: els", "wiener"])
def test_a_path_that_leaves_the_models_root_is_refused(root: Path, kind: str, bank: str) -> None:
    secret = root.parent / "secret"
    secret.write_bytes((root / "_banks" / "tiny.safetensors").read_bytes())
    (root / "linked").symlink_to(root.parent)
    write(root, f"kind: {kind}\nbank: {bank}\n")
    (root / "model" / "link").symlink_to(secret)
    error = refusal(root)
    assert f"expected a file inside the models root {root.resolve()}" in error.reason
    assert error.path == str(secret)


@pytest.mark.parametrize("inside", [True, False])
def test_an_absolute_path_is_refused(root: Path, inside: bool) -> None:
    bank = root / "_banks" / "tiny.safetensors" if inside else "/etc/hostname"
    write(root, f"kind: wiener\nbank: {bank}\n")
    assert "expected a path relative to the model's folder" in refusal(root).reason


@pytest.mark.parametrize("statistic", ["mean", "variance"])
def test_a_statistic_outside_the_models_root_is_refused(root: Path, statistic: str) -> None:
    save_file({statistic: torch.zeros(1)}, root.parent / "secret")
    other = "variance" if statistic == "mean" else "mean"
    write(root, f"{GAUSSIAN}{statistic}: ../../secret\n{other}: 1\n")
    assert "inside the models root" in refusal(root).reason


def test_a_model_folder_that_links_outside_is_refused(root: Path) -> None:
    outside = write(root.parent, ELS, "outside")
    (root / "model").symlink_to(outside.parent)
    assert ModelRepository(root).names() == ["model"]
    assert refusal(root).path == str(outside)


@pytest.mark.parametrize(
    ("bank", "reason"),
    [
        ("nothing.safetensors", "expected a file, found none"),
        ("../_banks", "expected a file, found none"),
        ('"a\\0b"', "null"),
        ("x" * 300, "name too long"),
        ("loop", "loop"),
    ],
)
def test_a_bank_that_is_no_file_is_refused(root: Path, bank: str, reason: str) -> None:
    write(root, f"kind: wiener\nbank: {bank}\n")
    (root / "model" / "loop").symlink_to("loop")
    assert reason in str(refusal(root)).lower()


def _truncated(data: bytes) -> bytes:
    return data[:-7]


def _flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def _of_version_9(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["version"] = "9"
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncated, "not a bank"),
        (_flipped, "the fingerprint does not match"),
        (_of_version_9, "expected els-bank version 1, got els-bank version 9"),
        (lambda data: b"", "not a bank"),
        (lambda data: b"\x80\x04cos\nsystem\n", "not a bank"),
    ],
)
def test_a_damaged_bank_is_refused_by_name(
    root: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    bank = root / "_banks" / "tiny.safetensors"
    bank.write_bytes(damage(bank.read_bytes()))
    write(root, ELS)
    error = refusal(root)
    assert error.path == str(bank)
    assert reason in error.reason


def test_children_without_model_yaml_or_with_a_mark_before_their_name_are_no_models(
    root: Path,
) -> None:
    for name in ("good", "_off", ".hidden"):
        write(root, ELS, name)
    (root / "empty").mkdir()
    (root / "file").write_text("kind: wiener")
    assert ModelRepository(root).names() == ["good"]


def test_a_root_that_is_no_folder_is_refused(root: Path) -> None:
    for path in (root / "none", root / "_banks" / "tiny.safetensors"):
        with pytest.raises(LoadError, match="expected a folder of models"):
            ModelRepository(path).names()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Be somebody whom permissions stop, even where the tests run as root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture
def volume() -> Iterator[Path]:
    """A models root, with one model, that everybody can reach, and what is in it be closed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield write_models(Path(folder) / "models", {"good": DOCUMENTS["gaussian"]})


def test_a_folder_that_may_not_be_read_is_refused_by_name_and_the_others_load(
    volume: Path,
) -> None:
    closed = write(volume, GAUSSIAN, "closed").parent
    closed.chmod(0)
    with as_nobody():
        assert ModelRepository(volume).names() == ["closed", "good"]
        assert "expected a file, got [Errno 13]" in refusal(volume, "closed").reason
        assert ModelRepository(volume).load("good").info.kind == "gaussian"
    closed.chmod(0o755)


def test_what_a_file_system_keeps_for_itself_is_no_model(volume: Path) -> None:
    (volume / "lost+found").mkdir(mode=0o700)
    with as_nobody():
        assert ModelRepository(volume).names() == ["good"]


def test_a_root_that_may_not_be_read_is_refused_with_the_reason(volume: Path) -> None:
    volume.chmod(0)
    with as_nobody(), pytest.raises(LoadError, match="can be read, got Permission denied"):
        ModelRepository(volume).names()
    volume.chmod(0o755)


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_every_kind_is_loaded_and_answers(root: Path, name: str) -> None:
    denoiser = load(root, DOCUMENTS[name])
    x = torch.zeros(2, *denoiser.info.shape)
    assert denoiser.denoise(make_query(x, from_sigma([0.5]))).mean.shape == x.shape


def test_a_bank_that_is_replaced_within_a_tick_of_the_clock_is_read_anew(root: Path) -> None:
    write(root, ELS)
    models, path = ModelRepository(root), root / "_banks" / "tiny.safetensors"
    os.utime(path, ns=(1, 1))
    old = models.load("model")
    save_bank(tiny_bank(seed=1), path)
    os.utime(path, ns=(1, 1))
    new = models.load("model")
    assert old.info.bank is not None
    assert new.info.bank is not None
    assert old.info.bank.fingerprint != new.info.bank.fingerprint


def test_models_of_one_bank_share_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []

    def recorded(path: Path) -> Bank:
        loaded.append(path)
        return load_bank(path)

    monkeypatch.setattr(bank_cache, "load_any_bank", recorded)
    for name in ("a", "b", "c"):
        write(root, ELS if name != "c" else f"kind: wiener\n{BANK}", name)
    (root / "alias.safetensors").symlink_to(root / "_banks" / "tiny.safetensors")
    write(root, "kind: analytic\nmachine: ideal\nbank: ../alias.safetensors\n", "d")
    repository = ModelRepository(root)
    models = [repository.load(name) for name in repository.names()]
    assert loaded == [root.resolve() / "_banks" / "tiny.safetensors"]
    analytic = [model for model in models if isinstance(model, AnalyticDenoiser)]
    assert len({id(model._attention) for model in analytic}) == 1


@pytest.mark.parametrize(
    ("mean", "variance", "expected_mean", "expected_variance"),
    [
        ("0.5", "2", 0.5, 2.0),
        ("[0.5, -1]", "[2, 3.0]", [[[0.5]], [[-1.0]]], [[[2.0]], [[3.0]]]),
        ("stats.safetensors", "0", "file", 0.0),
        ("0", "stats.safetensors", 0.0, "file"),
    ],
)
def test_a_gaussian_takes_numbers_one_a_channel_or_a_file(
    root: Path, mean: str, variance: str, expected_mean: object, expected_variance: object
) -> None:
    statistics = {
        "mean": torch.linspace(-1, 1, 24).reshape(2, 3, 4),
        "variance": torch.linspace(0, 2, 24, dtype=torch.float64).reshape(2, 3, 4),
    }
    write(root, f"{GAUSSIAN}mean: {mean}\nvariance: {variance}\n")
    save_file(statistics, root / "model" / "stats.safetensors")
    denoiser = ModelRepository(root).load("model")
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype(np.float32)
    got = denoiser.denoise(make_query(torch.from_numpy(x), from_sigma([0.5]))).mean.numpy()
    mu, v = (
        statistics[name].double().numpy() if value == "file" else np.array(value, np.float64)
        for name, value in (("mean", expected_mean), ("variance", expected_variance))
    )
    np.testing.assert_allclose(got, mu + v / (v + 0.25) * (x - mu), rtol=1e-5, atol=1e-6)


def test_a_name_is_one_of_the_models_exactly_if_it_is_listed(tmp_path: Path) -> None:
    root = write_models(
        tmp_path / "models",
        {"a": DOCUMENTS["wiener"], "b c": DOCUMENTS["wiener"], "_hidden": DOCUMENTS["wiener"]},
    )
    (root / "empty").mkdir()
    (root / "linked").symlink_to(root / "a")
    (root / "lost").symlink_to(root / "nowhere")
    write_models(tmp_path / "other", {"outside": DOCUMENTS["wiener"]})
    repository = ModelRepository(root)
    assert repository.names() == ["a", "b c", "linked"]
    odd = ("", ".", "..", "/", "a/", "./a", "a/1", "../other/outside", str(root / "a"), "A", "a\0")
    others = ("_hidden", "_banks", "empty", "lost", "x" * 4096, "\ud800")
    for name in (*repository.names(), *odd, *others):
        assert (name in repository) == (name in repository.names()), name


def test_a_fingerprint_changes_with_what_a_model_is_loaded_from(tmp_path: Path) -> None:
    document = "kind: gaussian\nshape: [1, 2, 2]\nmean: mean.safetensors\nvariance: {}\n"
    folder = tmp_path / "m"
    folder.mkdir()
    repository = ModelRepository(tmp_path)
    seen: set[str] = set()
    for mean, variance in ((0.0, 1.0), (0.0, 2.0), (0.5, 2.0), (0.5, 2.0)):
        (folder / "model.yaml").write_text(document.format(variance))
        # By another name first, as whoever deploys it would.
        save_file({"mean": torch.full((1, 2, 2), mean)}, folder / "new")
        (folder / "new").replace(folder / "mean.safetensors")
        (folder / "unrelated").write_text(str(len(seen)))
        repository.load("m")
        seen.add(repository.fingerprint("m"))
        fresh = ModelRepository(tmp_path)
        fresh.load("m")
        assert fresh.fingerprint("m") in seen
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x04cos\nsystem\n", "expected a safetensors file"),
        (b"", "expected a safetensors file"),
        ({"median": torch.zeros(1)}, "expected a tensor 'mean', got ['median']"),
        ({"mean": torch.full((1,), torch.inf)}, "mean: expected finite"),
    ],
)
def test_a_statistic_that_cannot_be_read_is_refused(
    root: Path, content: bytes | dict[str, torch.Tensor], reason: str
) -> None:
    write(root, f"{GAUSSIAN}mean: stats\nvariance: 1\n")
    path = root / "model" / "stats"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    assert reason in str(refusal(root))


def test_a_number_is_a_window_at_every_level_and_a_table_is_one_by_level(root: Path) -> None:
    assert load(root, f"{ELS}window: 7\n", "number").info.window == WindowTable.constant(7)
    table = load(root, f"{ELS}window: {{sigma: [0.1, 10], k: [1, 9]}}\n", "table").info.window
    assert table == WindowTable((0.1, 10.0), (1, 9))


def test_auto_is_the_paper_s_table_clipped_unless_the_folder_has_a_calibrated_one(
    root: Path,
) -> None:
    assert load(root, ELS, "default").info.window == default_windows().clipped(11)
    write(root, f"{ELS}window: auto\n", "calibrated")
    (root / "calibrated" / "windows.yaml").write_text("sigma: [0.5, 5.0]\nk: [3, 5]\n")
    calibrated = ModelRepository(root).load("calibrated").info.window
    assert calibrated == WindowTable((0.5, 5.0), (3, 5))
    model = root / "calibrated" / "model.yaml"
    model.write_text(model.read_text().replace("auto", "fashion-mnist-resnet"))
    named = ModelRepository(root).load("calibrated").info.window
    assert named == default_windows().clipped(11)


@pytest.mark.parametrize(
    "table", ["", "sigma: [1]\n", "sigma: [1]\nk: [2]\n", "sigma: [2, 1]\nk: [1, 3]\n", "k: ["]
)
def test_a_malformed_calibrated_table_is_refused_by_its_own_name(root: Path, table: str) -> None:
    write(root, ELS)
    path = root / "model" / "windows.yaml"
    path.write_text(table)
    assert refusal(root).path == str(path)


@pytest.mark.parametrize("named", ["../_banks/parts", "../_banks/parts/manifest.json"])
@pytest.mark.parametrize("kind", ["analytic\nmachine: els\nwindow: 3", "wiener"])
def test_a_bank_in_parts_answers_as_the_bank_of_one_file(root: Path, named: str, kind: str) -> None:
    bank = tiny_bank()
    parts = root / "_banks" / "parts"
    array = bank.images.transpose(0, 2, 3, 1)
    source = Source(root, array, labels=bank.labels, label_names=bank.label_names)
    build_parts(source, bank.label_names, parts, Request(2, source="tests"))
    answers = []
    for name, path in (("one", "../_banks/tiny.safetensors"), ("parts", named)):
        denoiser = load(root, f"kind: {kind}\nbank: {path}\n", name)
        query = make_query(torch.zeros(2, *bank.shape), from_sigma([0.5] * 2))
        answers.append(denoiser.denoise(query).mean.numpy().tobytes())
        assert denoiser.info.bank is None or denoiser.info.bank.fingerprint == bank.fingerprint
    assert answers[0] == answers[1]
    (parts / "part-00001.safetensors").unlink()
    assert "part-00001.safetensors: No such file" in str(refusal(root, "parts"))
