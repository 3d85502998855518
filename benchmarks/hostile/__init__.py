"""Hostile callers at a real server: what they may cost it and others."""
