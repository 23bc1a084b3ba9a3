"""A randomized run of user actions and faults, for use before a release.

    make soak MINUTES=20 SEED=7                   # python -m tests.soak --minutes 20 --seed 7
    python -m tests.soak --seed 7 --case 31       # that case again

A case is a random model, task, precision and solver, on which a random sequence of actions and
faults happens. All of it follows from the seed and the case's number. After each of them the
invariants of :meth:`~tests.soak.case.Case.check` are tested, after each fault also those of
:func:`~tests.soak.faults.inject`.
"""
