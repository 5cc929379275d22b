"""What of the command line is installed with `flashgau.ptx` and `flashgau.roof`: flashgau-instruments.

`executed` is `flashgau check --execute`, whose cases `executing` runs; `loops` and `operations` are those options of
`flashgau compile`, and `ranking` is `flashgau tune --model`.
"""
