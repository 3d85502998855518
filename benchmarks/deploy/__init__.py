"""Rollouts, deaths, hangs and scale: three real servers on loopback, behind both balancers."""
