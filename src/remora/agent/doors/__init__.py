"""One door per protocol. A door turns messages into operations and answers into messages, and decides nothing else."""
