"""Accelerators for functions in microVMs."""
