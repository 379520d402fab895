"""Speed, memory and the experiments of the paper; run each as `python -m benchmarks.NAME`."""
