"""What of the command line is installed with `flashgau.training`: flashgau-training.

`train`, `sample`, `eval`, `export` and `demo` are the commands of these names; the last has its page (`report`) and its
time and memory against length (`measuring`).
"""
