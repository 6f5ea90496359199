"""The whole of loreg on real weights: push two adapters, merge each and both, prove it, and take it back.

    python examples/demo.py
    python examples/demo.py --base HUB_ID_OR_PATH

Every command is printed before it runs, and can be typed by hand from the root of the repository. All output
goes to ``demo/``; that of an earlier run is removed first, but the base is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = "demo/smollm2-135m"
OUTPUTS = ("home", "sql", "humor", "both", "unmerged")
# The commands of this very environment, whatever else the caller's PATH finds first.
ENVIRONMENT = {
    **os.environ,
    "LOREG_HOME": "demo/home",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
}


def run(command: str, capture: bool = False) -> str:
    """Echo ``command`` and run it in ``ROOT``; its stdout if ``capture``. Ends the demo if it fails."""
    print(f"\n$ {command}", flush=True)
    try:
        done = subprocess.run(
            shlex.split(command), cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE if capture else None
        )
    except FileNotFoundError as error:
        sys.exit(f"{error.filename}: expected a command, found none; run `pip install -e '.[demo]'` first.")
    if done.returncode:
        sys.exit(done.returncode)
    if capture:
        print(done.stdout, end="", flush=True)
    return done.stdout or ""


def add_base(path: str, name: str) -> dict[str, Any]:
    """What ``loreg base add --json`` says about the base at ``path``."""
    found: dict[str, Any] = json.loads(run(f"loreg base add {shlex.quote(path)} --name {name} --json", capture=True))
    return found


def main_job() -> None:
    """Base, push, merge, compare, unmerge; exits 1 unless the base came back bit for bit."""
    run(f"python examples/make_base.py {BASE}")
    base = add_base(BASE, "smollm2")
    for name in ("sql", "humor"):
        run(f"loreg push examples/adapters/{name} --base smollm2 --name {name}")
    for name in ("sql", "humor"):
        run(f"loreg merge --apply {name} --out demo/{name}")
    run("loreg merge --apply sql+humor --out demo/both --verify forward")
    run(f"python examples/complete.py base={BASE} sql=demo/sql humor=demo/humor sql+humor=demo/both")
    run("loreg unmerge demo/both --out demo/unmerged")
    back = add_base("demo/unmerged", "unmerged")
    print(f"\nbase      {base['weights_root']}\nunmerged  {back['weights_root']}")
    if base["weights_root"] != back["weights_root"]:
        sys.exit("The unmerged model: expected the base's weights_root, found another; the base did not come back.")
    print("equal: the base came back bit for bit")


def other_base(base: str) -> None:
    """Identify and show another base; there is nothing here to apply to it."""
    # The commands run in ROOT, but a path was typed in the caller's own directory.
    add_base(os.path.relpath(base, ROOT) if Path(base).exists() else base, "other")
    run("loreg base show other")
    print("\nThe adapters in examples/adapters belong to SmolLM2-135M-Instruct, so nothing is merged into this base.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", metavar="HUB_ID_OR_PATH", help="identify this base instead of SmolLM2-135M")
    options = parser.parse_args()
    started = time.monotonic()
    for name in OUTPUTS:
        shutil.rmtree(ROOT / "demo" / name, ignore_errors=True)
    print(f"$ cd {os.path.relpath(ROOT)}\n$ export LOREG_HOME={ENVIRONMENT['LOREG_HOME']}")
    if options.base:
        other_base(options.base)
    else:
        main_job()
    print(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
