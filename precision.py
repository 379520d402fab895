"""What is computed in all of float32, and what the backward pass computes once more instead of storing it."""

import contextlib
import threading
from functools import partial, wraps

import torch
from torch.utils.checkpoint import checkpoint


def full_precision(x):
    """Returns x with half-precision tensors, also those in lists and tuples, in float32."""
    if isinstance(x, list | tuple):
        return x._make(map(full_precision, x)) if hasattr(x, "_make") else type(x)(map(full_precision, x))
    half = torch.is_tensor(x) and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if half else x


def in_full_precision(function, x, *args):
    """Returns function(x, *args) without autocast, if it is on, and then with half-precision tensors in float32.

    It is for boxes, and for the scores that decide a selection, which half precision would round to a few values.
    """
    device = (x[0] if isinstance(x, list | tuple) else x).device.type
    if not torch.is_autocast_enabled(device):
        return function(x, *args)
    with torch.autocast(device, enabled=False):
        return function(*full_precision((x, *args)))


def published(method):
    """Decorates a method that is `in_full_precision` in the published training, where the module's `float32` is set."""

    @wraps(method)
    def chosen(self, *args):
        return in_full_precision(partial(method, self), *args) if self.float32 else method(self, *args)

    return chosen


_tf32 = threading.Lock()


@contextlib.contextmanager
def without_tf32():
    """Inside, a GPU computes in all bits of float32. The switches are the process's: one thread at a time is inside."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    with _tf32, contextlib.ExitStack() as afterwards:
        for part in switches:
            afterwards.callback(setattr, part, "fp32_precision", part.fp32_precision)
            part.fp32_precision = "ieee"
        yield


def recompute(module, *args):
    """Returns module(*args). In training the backward pass computes what is inside once more, instead of storing it."""
    return checkpoint(module, *args, use_reentrant=False) if module.training else module(*args)
