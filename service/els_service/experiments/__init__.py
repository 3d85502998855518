"""Offline work with models: training, calibration and comparison."""
