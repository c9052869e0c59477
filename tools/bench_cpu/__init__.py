"""The parts of ``tools/bench_cpu.py``: models, peers (one file each), processes, report."""
