"""The processes that touch accelerators: confined, supervised, fed through shared memory (`contract.py` says how)."""
