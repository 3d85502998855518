"""``els-server run`` without a folder serves the models that ship with the package."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from tests.support.processes import COMMAND, serving

from els_client import Client

NAMES = ["fashion-els", "fashion-els-circular", "fashion-ideal", "fashion-local", "fashion-wiener"]
START_S = 20


def cpu_seconds(process: int) -> float:
    """Return what a process has computed so far: its clock, however busy the machine is."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_bundled_models_are_ready_in_time_and_each_denoises() -> None:
    with serving(program=COMMAND) as server:
        assert cpu_seconds(server.process.pid) < START_S
        assert set(server.ready) == {"event", "grpc_port", "metrics_port"}
        assert server.ready["event"] == "ready"
        noisy = np.random.default_rng(0).normal(size=(1, 1, 28, 28)).astype(np.float32)
        with Client(server.target) as client:
            models = client.models()
            assert [model.name for model in models if model.kind != "network"] == NAMES
            for model in models:
                unlabelled = model.name.startswith("mnist-")
                label = None if unlabelled else 9
                assert (model.shape, model.label_count) == ((1, 28, 28), 0 if unlabelled else 10)
                assert unlabelled or model.label_names[9] == "Ankle boot"
                assert model.bank is not None
                assert model.bank.images == (60_000 if model.kind == "network" else 5000)
                window = 5 if model.window else None
                clean = client.denoise(
                    noisy, model=model.name, sigma=0.3, label=label, window=window
                )
                assert clean.shape == noisy.shape
                assert np.isfinite(clean).all()
        server.terminate()
        assert server.wait() == (0, "")
        records = server.records()
        assert {record["event"] for record in records} >= {"serving", "draining"}
        assert all({"event", "level", "timestamp"} <= record.keys() for record in records)
        assert [record for record in records if record["level"] not in ("debug", "info")] == []
