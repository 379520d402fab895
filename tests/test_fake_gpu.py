"""What a training step would do and store on a GPU, counted on tensors without values."""

import contextlib

import pytest
import torch

import ops
from benchmarks.fake_gpu import FakeGPU
from losses import SetCriterion
from model import build_model

SIZE, COUNTS = 512, [10, 7]


@pytest.fixture(scope="module")
def step():
    """The stand-in after the model and the criterion in mixed precision, and the bytes that the model alone keeps."""
    with torch.device("meta"):
        model = build_model("dimaskdino_r50").train()
    gpu = FakeGPU(model, torch.bfloat16)
    with gpu:
        images = torch.empty(len(COUNTS), 3, SIZE, SIZE, device="cuda")
        shapes = [{"labels": (n,), "boxes": (n, 4), "masks": (n, SIZE, SIZE)} for n in COUNTS]
        dtypes = {"labels": torch.int64, "boxes": torch.float32, "masks": torch.bool}
        targets = [{key: torch.empty(x[key], dtype=dtypes[key], device="cuda") for key in x} for x in shapes]
        outputs = model(images, targets)
        stored = sum(gpu.saved.values())
        assert outputs["mask_embeddings"].dtype == torch.bfloat16
        SetCriterion(model.config)(outputs, targets)
    return gpu, stored


def test_the_host_waits_once(step):
    gpu, _ = step
    assert len(gpu.waits) == 1, gpu.waits
    assert gpu.waits[0].startswith("_to_copy")  # the costs of all matchings


@pytest.mark.skipif(bool(ops.WITHOUT_OP["cuda"]), reason="the compiled op for cuda is not built; the other stores more")
def test_bytes_stored_for_the_backward_pass(step):
    """Commit cfacd25 stored 2.31 GB, and 8.1 GB at 1024 x 1024; the bound is as 5 GB there."""
    _, stored = step
    assert stored < 1.43e9


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: bool(x[0] > 0),
        lambda x: x.cpu(),
        lambda x: x[[1, 0]],
        lambda x: x + torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: x + torch.ones(2).to("cuda"),
        lambda x: x.copy_(torch.ones(2)),
        lambda x: x.nonzero(),
    ],
)
def test_the_stand_in_sees_what_waits(function):
    gpu = FakeGPU(torch.nn.Linear(1, 1))
    with gpu:
        x = torch.ones(2, device="cuda")
        (2 * x).add_(torch.ones(2).to("cuda", non_blocking=True)).sum()  # these do not
        assert not gpu.waits
        with contextlib.suppress(Exception):  # there is no value to read
            function(x)
    assert len(gpu.waits) == 1
