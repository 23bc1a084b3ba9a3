"""How long the OpenMP threads of torch spin while they wait for each other. Imports no torch."""

import os
import sys

# Any of these is the user's own choice.
_POLICIES = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')
SPIN_COUNT = 12_000


def bound_spinning() -> None:
    """Bound the time that OpenMP threads spin at a barrier before they sleep.

    On a busy machine, a spinning thread can keep the thread it waits for from running.
    ``GOMP_SPINCOUNT`` is set for this process and its children, unless the environment already sets
    a policy or torch is loaded: its OpenMP reads the variable only once.
    """
    if 'torch' not in sys.modules and not any(name in os.environ for name in _POLICIES):
        os.environ['GOMP_SPINCOUNT'] = str(SPIN_COUNT)
