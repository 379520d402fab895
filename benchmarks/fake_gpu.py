"""A stand-in for a GPU: what a model would do and store on one, counted without one and without the memory for it."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result has a shape or a value that the host has to read.
READING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave.Tensor")


class FakeGPU(TorchDispatchMode):
    """While it is entered, tensors on the device "cuda" have shapes and no values; those on the CPU are real.

    model      moved there, for good; it may come from the device "meta"
    precision  the dtype of autocast, None for none

    calls: number of operators on the GPU. waits: a line for every time that the host waits for it, by copying or by
    reading a value; a copy to the host gives zeros, reading raises. saved: {storage: bytes} that the backward pass
    needs, without the model's own.
    """

    def __init__(self, model, precision=None):
        super().__init__()
        self.precision, self.calls, self.waits, self.saved = precision, 0, [], {}
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.save, lambda tensor: tensor)
        with self.fake:
            for module in model.modules():
                for name, value in module.named_parameters(recurse=False):
                    module._parameters[name] = nn.Parameter(torch.empty_like(value, device="cuda"))
                for name, value in module.named_buffers(recurse=False):
                    module._buffers[name] = torch.empty_like(value, device="cuda")
        self.own = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}

    def save(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.saved[storage._cdata] = storage.nbytes()
        return tensor

    def __enter__(self):
        self.fake.__enter__()
        self.hooks.__enter__()
        torch.set_autocast_enabled("cuda", self.precision is not None)  # torch.autocast would look for a GPU
        torch.set_autocast_dtype("cuda", self.precision or torch.bfloat16)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)
        self.hooks.__exit__(*error)
        self.fake.__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        target = torch.device(kwargs.get("device") or "cpu").type
        if target == "cpu" and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return operator(*args, **kwargs)
        name = str(operator).removeprefix("aten.")
        self.calls += not name.startswith("prim.")  # questions about a tensor
        indices = tree_leaves(args[1:2]) if name.startswith("index") else []
        boolean = any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices)
        if name.startswith(READING) or boolean:
            self.waits.append(name)
        result = operator(*args, **kwargs)
        devices = {x.device.type for x in tensors if x.dim() or "copy" in name}
        if "copy" in name and len(devices | {x.device.type for x in tree_leaves(result)}) > 1:
            if not kwargs.get("non_blocking") and True not in args[2:]:
                self.waits.append(f"{name} {tuple(result.shape)}")
            if result.device.type == "cpu":
                with unset_fake_temporarily():
                    return torch.zeros(result.shape, dtype=result.dtype)
        return result
