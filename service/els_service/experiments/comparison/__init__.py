"""Networks beside the machines that predict them: calibration, comparison, figure and record."""
