"""What holds the operations to the fp64 reference on a machine, and measures them there: the work of several commands.

`cases` and `configurations` are what is held, `checking` holds it; `candidates` checks and times launch configurations
that might be faster, and `own` those of a kernel of one's own (`flashgau.tuning.search`); `measuring`
is time and memory against length. Nothing is loaded before it is used.
"""
