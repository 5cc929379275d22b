"""Operations beside the roof: every launch of a call, what it moves and multiplies, and a model of its time.

`cases` has the calls and the closed formulas of their floors, `launches` records what a call starts and executes the
addresses and branches of its compiled code, `clocks` models the time of one launch, `schedule` how a GPU's
multiprocessors share its programs, `against` holds the rows to recorded ones. Of single kernels, `loops` holds the hot
loops to recorded ones, and `modelling` ranks candidates by them. A modelled time is never a measured one.
"""

from .report import Row, Task, examine, examine_all, tasks

__all__ = ["Row", "Task", "examine", "examine_all", "tasks"]
