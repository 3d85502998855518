#!/usr/bin/env bash
# Guess: DDIMScheduler goes down its list of timesteps, each step to the next of the list; so any number of
# steps may be asked for, and more steps are never worse.
#
# Real behaviour: `step` does not look at the list. It goes from t to t - T // n (integer division), for T
# training timesteps and n steps. With timestep_spacing "trailing", which puts the steps T / n apart, the two
# agree only where n divides T. With 501 of 1000 the list falls by 2 and `step` removes noise for 1: every
# image keeps noise that the next step takes for signal, 41 % too much of everything at the end. 600 steps
# are worse than 20, and 1000 are right again. No warning; pictures look grainy, so one blames the network.
# Version: diffusers 0.42.1, torch 2.13.0, CPython 3.11.
# Source: DDIMScheduler.step and .set_timesteps, src/diffusers/schedulers/scheduling_ddim.py.
# Bitten: whoever raises the number of steps of a model whose scheduler_config.json says "trailing" (common with
# distilled and zero-terminal-SNR models), or compares samplers at other counts than divisors of 1000.
#
# The network here is the exact noise predictor of data N(0, 0.25), so images should have a standard deviation
# of 0.5 but for the error of the discretisation.
#
# Output seen:
#    20 steps: 0.431   expected 0.5
#   500 steps: 0.497   expected 0.5
#   501 steps: 0.706   expected 0.5
#   600 steps: 0.659   expected 0.5
#  1000 steps: 0.498   expected 0.5
#
# Exits 1 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from diffusers import DDIMScheduler

VARIANCE = 0.25


def deviation(steps: int) -> float:
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    assert (scheduler.timesteps[:-1] > scheduler.timesteps[1:]).all()
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x /= x.std()
    for t in scheduler.timesteps:
        signal = scheduler.alphas_cumprod[t].double()
        noise = (1 - signal).sqrt() * x / (signal * VARIANCE + 1 - signal)
        x = scheduler.step(noise, t, x).prev_sample
    return float(x.std())


found = {steps: deviation(steps) for steps in (20, 500, 501, 600, 1000)}
for steps, value in found.items():
    print(f"{steps:5} steps: {value:.3f}   expected {VARIANCE**0.5}")
right = all(abs(found[n] - 0.5) < 0.01 for n in (500, 1000))
sys.exit(not (right and found[501] > 0.65 and found[600] > 0.6))
PYTHON
