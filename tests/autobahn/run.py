#!/usr/bin/env python3
"""Runs the Autobahn WebSocket conformance cases against examples/echo.rs, the node's codec on blocking sockets.

Sections 1 to 7 and 10 run by default. 9 (large messages) runs on request, as any cases do: `run.py '9.*' 7.5.1`. 12 and 13
test compression, which is not offered. The report stays in target/autobahn/index.html.

Needs Python 3 and cargo; the suite is installed into tests/autobahn/venv on the first run. Exits with 0 only if every
case is OK, NON-STRICT or INFORMATIONAL.
"""

import argparse
import json
import subprocess
import sys
import venv
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VENV = HERE / "venv"
# Said to cargo as well: the environment may name another one.
TARGET = ROOT / "target"
REPORT = TARGET / "autobahn"

# The suite's cases under Python 3.
SUITE = "kosoku==0.1.0"
# Section: how many cases it has. A suite that ran fewer proved nothing.
SECTIONS = {"1": 16, "2": 11, "3": 7, "4": 10, "5": 20, "6": 145, "7": 37, "10": 1}
# Cases at a time: many of them wait for a second or two.
PARALLEL = 8

# What a case may come to, the worst last: conformant; conformant, but not as strict as it could be; left open by the RFC.
VERDICTS = ["OK", "NON-STRICT", "INFORMATIONAL", "FAILED"]


def suite() -> Path:
    """The suite's command, installed if it is not there."""
    command = VENV / "bin" / "kosoku"
    marker = VENV / "installed"
    if not marker.exists() or marker.read_text() != SUITE:
        venv.create(VENV, clear=True, with_pip=True)
        subprocess.run([VENV / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", SUITE], check=True)
        marker.write_text(SUITE)
    return command


def verdict(case: dict) -> str:
    """One of VERDICTS: the worse one of the exchange and of the closing handshake."""
    parts = (case["behavior"], case["behaviorClose"])
    return max((part if part in VERDICTS else "FAILED" for part in parts), key=VERDICTS.index)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="case ids or globs (default: every required section)")
    args = parser.parse_args()
    cases = args.cases or [f"{section}.*" for section in SECTIONS]

    command = suite()
    build = ["cargo", "build", "--quiet", "--example", "echo", "--target-dir", TARGET]
    subprocess.run(build, cwd=ROOT, check=True)
    server = TARGET / "debug" / "examples" / "echo"

    index = REPORT / "index.json"
    index.unlink(missing_ok=True)
    with subprocess.Popen([server, "0"], stdout=subprocess.PIPE, text=True) as echo:
        try:
            address = echo.stdout.readline().strip()
            include = [option for case in cases for option in ("--include", case)]
            # Its exit status is not asked: the verdicts are read from the report, each of them.
            subprocess.run([command, f"ws://{address}", *include, "--parallelism", str(PARALLEL), "--outdir", REPORT])
        finally:
            echo.terminate()

    if not index.exists():
        print("no report: the suite did not run")
        return 1
    ran = {case: result for agent in json.loads(index.read_text()).values() for case, result in agent.items()}
    missing = 0
    if not args.cases:
        counted = Counter(case.split(".")[0] for case in ran)
        for section, expected in SECTIONS.items():
            if counted[section] != expected:
                missing += abs(expected - counted[section])
                print(f"section {section}: {counted[section]} cases ran instead of {expected}")
    total = Counter()
    for case, result in ran.items():
        total[verdict(result)] += 1
        if verdict(result) != "OK":
            print(f"{case}: {result['behavior']}, close {result['behaviorClose']}")
    total["FAILED"] += missing
    print(", ".join(f"{total[name]} {name.lower()}" for name in VERDICTS))
    return 0 if ran and not total["FAILED"] else 1


if __name__ == "__main__":
    sys.exit(main())
