"""Python that looks for `lineardit` beside a checkout of that name finds this file; the package is the folder in it."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if __name__ == "lineardit":
    _package = Path(__file__).parent / "lineardit"
    _spec = spec_from_file_location(__name__, _package / "__init__.py", submodule_search_locations=[str(_package)])
    assert _spec is not None and _spec.loader is not None
    sys.modules[__name__] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
