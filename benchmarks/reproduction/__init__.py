"""Results beside published ones: one table with a row a network and machine, and verdicts."""
