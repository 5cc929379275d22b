"""Speed, memory and correctness of every operation, side by side with its alternatives.

Run from the root of a checkout: ``python -m bench attention``; ``python -m bench --help`` lists the rest.

One file per operation (`attention.py`, `gated_attention.py`, `glu.py`, `feed_forward.py`, `gau.py`, `gau_layer.py`,
`mixed_chunk.py`, `flash_layer.py`, `decode.py`) says *what* is measured: its cases, its providers (the competing
implementations) and its goals; what several of them stand beside is in `peers.py`, `layers.py` and `transformer.py`.
The rest says *how*: `cases.py` the vocabulary, `correct.py` the check every provider must pass before it is timed,
`timing.py` and `memory.py` the two probes, `machine.py` what the numbers depend on, `harness.py` the run, `report.py`
tables, JSON and plots.
"""
