"""Rollouts, crashes, hangs and scaling of three servers on loopback, with both load balancers."""
