"""These tests share the trainers of tests/defenses."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "defenses"))
sys.path.insert(0, str(Path(__file__).parent))
