"""Run sections of the benchmark in this process and send what they find as JSON lines.

    python -m benchmarks.worker SECTION... [--quick] [--gpu]

`python -m benchmarks` starts one worker per environment: an allocator setting or a forced CPU
variant needs a process of its own. Everything that libraries print goes to stderr.
"""

import argparse
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

MICRO = ("micro", "bars", "family", "hugepages", "fused", "peers")
MODULES = {
    "statistics": "moments",
    "training": "digits",
    "models": "models",
    "attention": "attention",
    "compiled": "compiled",
    "gpu": "gpu",
}


def micro(emit, sections):
    import pytest

    class Collector:
        failed = False

        def pytest_collection_finish(self, session):
            emit({"section": ", ".join(sections), "total": len(session.items)})

        def pytest_runtest_logreport(self, report):
            if report.failed:
                self.failed = True
                print(report.longreprtext, file=sys.stderr)
            if report.when == "call":
                found = dict(report.user_properties)
                for row in found.get("rows", ()):
                    emit({"row": row})
                for note in found.get("notes", ()):
                    emit({"note": note})
                emit({"step": report.nodeid})

    os.environ["BENCH_SECTIONS"] = ",".join(sections)
    collector = Collector()
    path = Path(__file__).with_name("test_micro.py")
    # The repository's own pytest options are for its tests.
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default"]
    options += ["--benchmark-only", "--benchmark-disable-gc", "--benchmark-columns=rounds"]
    code = pytest.main([str(path), *options], plugins=[collector])
    return 0 if code in (0, 5) and not collector.failed else 1  # 5: nothing to run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="+", choices=[*MICRO, *MODULES])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gpu", action="store_true", help="on the GPU, where there is a choice")
    args = parser.parse_args()
    if args.quick:
        os.environ["QUICK"] = "1"

    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    from benchmarks import record

    versions = record.versions()
    device = "cuda" if args.gpu else "cpu"

    def emit(message):
        if "row" in message:
            message["row"] = versions | {"device": device} | message["row"]
        channel.write(json.dumps(message, default=lambda value: value.item()) + "\n")

    code = 0
    timed = [section for section in args.sections if section in MICRO]
    if timed:
        code = micro(emit, timed)
    for section in args.sections:
        if section not in MICRO:
            emit({"section": section, "total": None})
            module = importlib.import_module(f"benchmarks.{MODULES[section]}")
            try:
                module.run(emit, args.quick, device)
            except ImportError as error:
                emit({"note": f"{section}: left out, {error}"})
            except Exception:  # the sections after it run
                traceback.print_exc()
                code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
