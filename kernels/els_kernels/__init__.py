"""Patch attention."""
