"""Comparison of networks with the machines that predict them: calibration, figure and record."""
