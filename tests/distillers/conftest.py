"""Lets the tests of methods import their ``references``."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
