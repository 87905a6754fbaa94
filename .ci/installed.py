"""Check an installed wheel: `python installed.py 0.2.0`. It runs in an empty environment."""

import sys
from importlib.metadata import version
from pathlib import Path

import hf_dynprune

expected = sys.argv[1]
package = Path(hf_dynprune.__file__).parent
assert "site-packages" in package.parts, f"imported from {package}: expected the installed wheel"
for found in (version("hf-dynprune"), hf_dynprune.__version__):
    assert found == expected, f"the version is {found}: expected {expected}"
for name in hf_dynprune.__all__:  # each is imported when it is asked for
    getattr(hf_dynprune, name)
print(f"All {len(hf_dynprune.__all__)} names of hf_dynprune {expected} can be imported.")
