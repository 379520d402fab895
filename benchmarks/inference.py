"""Times the detection of objects in an image: python -m benchmarks.inference --preset P [--compile]."""

import argparse
import sys
import time
from statistics import median

import torch

from config import PRESETS
from model import build_model, postprocess

OUTPUT = (480, 653)  # size of the image that boxes and masks are wanted in


def measure(function, device, runs):
    """Median seconds of a call, after two untimed ones."""
    seconds = []
    for _ in range(runs + 2):
        begin = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return median(seconds[2:])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--preset", choices=PRESETS, default="dimaskdino_r50", help="default: %(default)s")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1088), metavar=("HEIGHT", "WIDTH"), help="800 1088")
    parser.add_argument("--batch-size", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"], help="default here: %(default)s")
    parser.add_argument("--runs", type=int, default=5, help="timed runs, the median counts (default: 5)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.inference: torch sees no GPU; run it with --device cpu")

    torch.manual_seed(0)
    model = build_model(args.preset).to(args.device).eval()
    forward = torch.compile(model) if args.compile else model
    images = torch.rand(args.batch_size, 3, *args.size, device=args.device)
    dtype = None if args.precision == "float32" else getattr(torch, args.precision)

    @torch.inference_mode()
    def run(detections):
        with torch.autocast(args.device, dtype=dtype, enabled=dtype is not None):
            outputs = forward(images)
        if detections:
            postprocess(outputs, [tuple(args.size)] * len(images), [OUTPUT] * len(images))

    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    how = "compiled" if args.compile else "eager"
    print(f"{machine}; torch {torch.__version__}; {args.preset}, {args.batch_size} x {args.size[0]} x {args.size[1]}")
    for name, detections in (("model alone", False), (f"with detections at {OUTPUT[0]} x {OUTPUT[1]}", True)):
        seconds = measure(lambda detections=detections: run(detections), args.device, args.runs)
        print(f"{how}, {args.precision}, {name}: {seconds:.3f} s, {args.batch_size / seconds:.2f} images/s")


if __name__ == "__main__":
    main()
