"""What of the command line needs `flashgau.ptx` and `flashgau.roof`, and is installed with them: flashgau-instruments.

`executed` is `flashgau check --execute`, whose cases `executing` runs; `loops` and `operations` are those options of
`flashgau compile`, and `ranking` is `flashgau tune --model`.
"""
