"""Made-up runs, by their module's name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
