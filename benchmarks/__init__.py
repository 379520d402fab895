"""Speed and memory; run each as `python -m benchmarks.NAME`."""
