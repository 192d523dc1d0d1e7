"""One harness for speed: Remora, its yardsticks and its peers, measured in the same run.

A speed is a ratio to a named yardstick, because machines differ and are noisy. Each round measures every candidate for
a short time, one after the other; a ratio is the median over rounds of the ratio within a round, so that a disturbance
of some seconds spoils rounds, not results.
"""
