"""Implementations that a test on a CPU may force.

Triton's kernels run in its interpreter (conftest.py switches it on), hundreds of times slower than compiled: they are
in ALL, for tests on few tokens, and not in PORTABLE.
"""

from importlib.util import find_spec

from lineardit.kernels.window import implementations

PORTABLE = tuple(name for name in implementations() if name != "triton")
ALL = implementations() if find_spec("triton") else PORTABLE
