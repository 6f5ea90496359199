from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# tests/ is on no path of its own: the server is loaded from its file, once, under the name that tests import.
if "hub_server" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).parents[1] / "hub_server.py")
    sys.modules["hub_server"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["hub_server"])

hub = sys.modules["hub_server"].hub
