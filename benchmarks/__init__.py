"""Benchmarks: ``python -m benchmarks.run``, then ``.compare`` and ``.plot`` on the JSON files it writes."""

import os

# Before torch is imported: its profiler, which counts scratch memory, otherwise reports every start on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
