"""Run something in a forked child of the test process."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable


def in_forked_child(check: Callable[[], bool]) -> bool:
    """Whether ``check`` returned True in a forked child; what it raises is printed there."""
    with warnings.catch_warnings():
        # Python 3.12 warns of forking with threads running. That is what these tests are about.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if check() else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0
