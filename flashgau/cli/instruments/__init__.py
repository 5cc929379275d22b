"""What of the command line is installed with `flashgau.ptx` and `flashgau.roof`: flashgau-instruments.

`executed` is `flashgau check --execute`, whose cases `executing` runs; `loops` and `operations` are those options of
`flashgau compile`, `ranking` is `flashgau tune --model`, and `demo` that command, with its page (`report`) and its
time and memory against length (`measuring`).
"""
