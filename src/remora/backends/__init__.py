"""What runs inside a worker: one module per backend, one contract (`contract.py`)."""
