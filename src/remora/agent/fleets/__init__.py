"""MicroVMs that somebody else runs: where they are, who they are, and serving them while they are there."""
