"""What holds the operations to the fp64 reference on a machine: the work of several commands.

`cases` and `configurations` are what is held, `checking` holds it; `candidates` checks and times launch configurations
that might be faster, and `own` those of a kernel of one's own (`flashgau.tuning.search`). Nothing is loaded before it
is used.
"""
