"""Backbones against golden data and independent implementations; pretrained weights; gradient checkpointing."""

import functools
import pickle
import re
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import recipe
import torch
import torch.nn.functional as F
import torchvision
import toys
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

import backbone
from backbone import MobileNet, ResNet, Swin, build_backbone
from config import InputError
from convert import convert_state_dict
from detections import postprocess
from di import boxes_from_masks
from model import build_model
from train import parameter_groups
from weights import load_backbone_weights

REDUCED = Path(__file__).resolve().parent / "golden"
FULL = Path(__file__).resolve().parents[2] / "shared" / "golden"
SMALL = (32, 2, 4, 0.3)  # a Swin transformer for tests: channels, blocks of the third stage, window, stochastic depth


def randomized(module, seed=0):
    """The module with every parameter and floating-point buffer drawn anew, position tables and norms included."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            x = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if "running_var" in name:
                x = 1 + x.abs()
            elif value.dim() > 1 and "relative_position" not in name:
                x = x / value[0].numel() ** 0.5
            value.copy_(x)
    return module.eval()


# Golden data


def close(x, golden):
    golden = np.asarray(golden, np.float64)
    return np.abs(x.double().numpy() - golden).max() <= 1e-6 * np.abs(golden).max()


@pytest.fixture(scope="module")
def weights():
    """`recipe.weights` that draws what both models have once, as this takes longer than the models do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "tensor", functools.cache(recipe.tensor))
        yield recipe.weights


@pytest.mark.parametrize("preset", ["dimaskdino_swin_l", "maskdino_swin_l"])
def test_golden(preset, weights):
    with torch.device("meta"):  # no random values that are replaced at once
        model = build_model(preset)
    state = convert_state_dict(weights(REDUCED / f"keys_{preset}.json.gz"))
    model.load_state_dict(state, assign=True)
    image = torch.from_numpy(recipe.image(256, 320, 0)).permute(2, 0, 1).double() / 255
    maps = []
    model.backbone.register_forward_hook(lambda module, args, output: maps.extend(output))
    with torch.no_grad():
        [detections] = postprocess(model.eval()([image]), [(256, 320)], [(256, 320)])

    for path in (REDUCED / f"{preset}.npz", FULL / f"{preset}.npz"):
        if path.parent == FULL and not path.exists():
            continue
        golden = np.load(path)
        for level, x in enumerate(maps, start=2):
            assert x.shape[2:] == (256 // 2**level, 320 // 2**level)
            assert close(x[0].mean((1, 2)), golden[f"res{level}_channel_mean"])
            assert close(x[0, :, x.shape[2] // 2, x.shape[3] // 3], golden[f"res{level}_row"])
        assert close(detections["scores"], golden["det_scores"])
        assert detections["labels"].tolist() == golden["det_labels"].tolist()
        assert close(detections["boxes"], golden["det_boxes"])
        assert detections["masks"].sum((1, 2)).tolist() == golden["det_mask_area"].tolist()


# An independent implementation: every token against every other, windows as a grid that the shift displaces


def reference_block(block, x, shift):
    """A Swin block on one map x (H, W, C)."""
    (H, W, C), window, heads = x.shape, block.attn.window_size[0], block.attn.num_heads
    padded = F.pad(block.norm1(x), (0, 0, 0, -W % window, 0, -H % window))
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in padded.shape[:2]), indexing="ij")
    visible, offsets = True, []
    for position in (rows.flatten(), columns.flatten()):
        cell = (position - shift).div(window, rounding_mode="floor")
        visible = visible & (cell[:, None] == cell)
        offsets.append((position[:, None] - position).clamp(1 - window, window - 1) + window - 1)
    bias = block.attn.relative_position_bias_table[offsets[0] * (2 * window - 1) + offsets[1]]  # (N, N, heads)
    q, k, v = block.attn.qkv(padded).view(-1, 3, heads, C // heads).unbind(1)
    logits = torch.einsum("qhc,khc->hqk", q, k) / (C // heads) ** 0.5 + bias.permute(2, 0, 1)
    attention = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    attended = block.attn.proj(torch.einsum("hqk,khc->qhc", attention, v).flatten(1))
    x = x + attended.view(padded.shape)[:H, :W]
    return x + block.mlp(block.norm2(x))


def reference_swin(swin, image):
    """The four maps (H, W, C) of one image (3, H, W)."""
    features = swin.body.features
    convolution, norm = features[0][0], features[0][2]
    H, W = image.shape[1:]
    x = norm(convolution(F.pad(image, (0, -W % 4, 0, -H % 4))[None])[0].permute(1, 2, 0))
    maps = []
    for stage in range(4):
        if stage:
            merge = features[2 * stage]
            x = F.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
            x = torch.cat([x[i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
            x = merge.reduction(merge.norm(x))
        for i, block in enumerate(features[2 * stage + 1]):
            x = reference_block(block, x, i % 2 * (block.attn.window_size[0] // 2))
        maps.append(swin.norms[stage](x))
    return maps


@pytest.mark.parametrize("window", [5, 12])
@pytest.mark.parametrize("height, width", [(45, 70), (97, 61), (75, 107)])
def test_any_size(height, width, window):
    swin = randomized(Swin(32, 2, window, 0.3)).double()
    images = torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = swin(images)
        for b, image in enumerate(images):
            for x, expected in zip(maps, reference_swin(swin, image), strict=True):
                torch.testing.assert_close(x[b], expected.permute(2, 0, 1), rtol=1e-9, atol=1e-9)


def test_as_torchvision_where_no_window_covers_the_map():
    original = SwinTransformer([4, 4], 32, [2, 2, 2, 2], [1, 2, 4, 8], [3, 3])
    original = randomized(original).double()
    swin = Swin(32, 2, 3, 0.3).double().eval()
    swin.body.load_state_dict(original.state_dict(), strict=False)
    swin.norms[3].load_state_dict(original.norm.state_dict())
    image = torch.randn(1, 3, 160, 192, dtype=torch.float64)
    with torch.no_grad():
        expected = original.norm(original.features(image)).permute(0, 3, 1, 2)
        torch.testing.assert_close(swin(image)[3], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, depth", [("swin_t", 0.2), ("swin_s", 0.3), ("swin_b", 0.3), ("swin_l_384", 0.3)])
def test_stochastic_depth_grows_with_the_blocks(name, depth):
    with torch.device("meta"):
        blocks = [block for stage in build_backbone(name).stages for block in stage]
    torch.testing.assert_close([b.stochastic_depth.p for b in blocks], torch.linspace(0, depth, len(blocks)).tolist())


def test_position_tables_and_norms_have_no_weight_decay():
    with torch.device("meta"):
        model = build_model("tiny", backbone="swin_t")
    groups = parameter_groups(model, 1e-4, 1e-5)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay.keys() == {id(p) for p in model.parameters()}
    for name, p in model.backbone.named_parameters():
        free = "relative_position_bias_table" in name or re.search(r"norm|features\.0\.2", name)
        assert decay[id(p)] == (0 if free else 0.05), name


# Boxes from masks


@pytest.mark.parametrize("box_init, further, empty", [("mask", 0, [1, 1, 0, 0]), ("bitmask", 1, [0, 0, 0, 0])])
def test_boxes_from_masks(box_init, further, empty):
    H, W = 24, 40
    logits = torch.full((1, 5, H, W), -1.0, dtype=torch.float64)
    corners = [(3, 5, 3, 5), (0, 0, W - 1, H - 1), (7, 2, 30, 11), (W - 1, 4, W - 1, 9)]  # x0, y0, x1, y1, inclusive
    for query, (x0, y0, x1, y1) in enumerate(corners):
        logits[0, query, y0, x0] = logits[0, query, y1, x1] = 0.5
    expected = []
    for x0, y0, x1, y1 in corners:
        x1, y1 = x1 + further, y1 + further
        expected.append([(x0 + x1) / 2 / W, (y0 + y1) / 2 / H, (x1 - x0) / W, (y1 - y0) / H])
    expected = torch.tensor([expected + [empty]], dtype=torch.float64)
    torch.testing.assert_close(boxes_from_masks(logits, box_init), expected, rtol=0, atol=1e-15)


# Gradient checkpointing


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "small"])
def test_checkpointed_gradients_are_equal(name, monkeypatch):
    monkeypatch.setitem(backbone.SWINS, "small", SMALL)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    gradients, stored = [], []
    for grad_checkpoint in (False, True):
        model, saved = toys.model(backbone=name, grad_checkpoint=grad_checkpoint), {}

        def save(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            outputs = model(images, toys.targets(2, 2))  # random: stochastic depth, denoising
        leaves = [outputs, *outputs["aux_outputs"], outputs["interm_outputs"], outputs["dn_outputs"]]
        loss = sum(x.square().mean() for leaf in leaves for key, x in leaf.items() if key.startswith("pred_"))
        loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
        own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        stored.append(sum(size for key, size in saved.items() if key not in own))
    assert stored[1] < 0.75 * stored[0]
    assert any(grad is not None and grad.abs().max() > 0 for grad in gradients[0].values())
    for key, expected in gradients[0].items():
        assert (expected is None) == (gradients[1][key] is None), key
        assert expected is None or torch.equal(gradients[1][key], expected), key


# Pretrained weights


def detectron2_names(state):
    """A ResNet's state dict under the names that Detectron2 gives it, as arrays; the classifier included."""
    renamed = {}
    for name, value in state.items():
        name = name if name.startswith("layer") else "stem." + name
        for i in (4, 3, 2, 1):
            name = name.replace(f"layer{i}", f"res{i + 1}")
        name = re.sub(r"bn(\d)", r"conv\1.norm", name).replace("downsample.0", "shortcut")
        renamed[name.replace("downsample.1", "shortcut.norm")] = value.numpy()
    return renamed


def original_swin_names(state):
    """A torchvision Swin's state dict under the names of the original, with the buffers that the original saves."""
    renamed = {}
    for name, value in state.items():
        name = name.replace("features.0.0.", "patch_embed.proj.").replace("features.0.2.", "patch_embed.norm.")
        name = name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
        if match := re.match(r"features\.(\d)\.(.*)", name):
            stage, rest = divmod(int(match[1]) - 1, 2), match[2]
            name = f"layers.{stage[0]}.downsample.{rest}" if stage[1] else f"layers.{stage[0]}.blocks.{rest}"
        renamed[name] = value
    return renamed | {"layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}


@pytest.fixture(scope="module")
def classifiers():
    """The classifiers whose weights are loaded: ResNet-18, MobileNetV2 and a small Swin, random."""
    return {
        "resnet": randomized(torchvision.models.resnet18(num_classes=3)),
        "mobilenet": randomized(torchvision.models.mobilenet_v2(num_classes=3)),
        "swin": randomized(SwinTransformer([4, 4], 32, [2, 2, 2, 2], [1, 2, 4, 8], [4, 4], num_classes=3)),
    }


def fresh(kind):
    return {"resnet": lambda: ResNet("resnet18"), "mobilenet": MobileNet, "swin": lambda: Swin(*SMALL)}[kind]()


def write(path, content):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return path


FORMS = {
    "torchvision ResNet": ("resnet", lambda state: state, "w.pth"),
    "torchvision ResNet under model": ("resnet", lambda state: {"model": state, "epoch": 3}, "w.pth"),
    "Detectron2 ResNet": ("resnet", lambda s: {"model": detectron2_names(s), "__author__": "a"}, "w.pkl"),
    "Detectron2 ResNet, .pth": (
        "resnet",
        lambda s: {"backbone." + name: torch.from_numpy(x) for name, x in detectron2_names(s).items()},
        "w.pth",
    ),
    "torchvision MobileNetV2": ("mobilenet", lambda state: state, "w.pth"),
    "features of MobileNetV2 alone": (
        "mobilenet",
        lambda state: {name: value for name, value in state.items() if not name.startswith("classifier")},
        "w.pth",
    ),
    "torchvision Swin": ("swin", lambda state: state, "w.pth"),
    "original Swin": ("swin", lambda state: {"model": original_swin_names(state)}, "w.pth"),
    "original Swin, bare": ("swin", original_swin_names, "w.pth"),
    "Detectron2 Swin": ("swin", lambda state: {"model": original_swin_names(state)}, "w.pkl"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_weights(form, classifiers, tmp_path):
    kind, rename, file = FORMS[form]
    classifier, loaded = classifiers[kind], fresh(kind).eval()
    path = write(tmp_path / file, rename(classifier.state_dict()))
    if file.endswith(".pkl"):
        with pytest.raises(InputError, match="any program"):
            load_backbone_weights(loaded, path)
    load_backbone_weights(loaded, path, trust_pickle=True)
    image = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        if kind == "resnet":
            expected = nn.Sequential(*list(classifier.children())[:-2])(image)
            torch.testing.assert_close(loaded(image)[3], expected, rtol=1e-3, atol=1e-3)
        elif kind == "mobilenet":
            maps = loaded(image)
            assert [x.shape for x in maps] == [(1, 24, 64, 64), (1, 32, 32, 32), (1, 96, 16, 16), (1, 320, 8, 8)]
            for x, last in zip(maps, (3, 6, 13, 17), strict=True):
                expected = classifier.features[: last + 1](image)
                torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
        else:
            for name, value in classifier.features.state_dict().items():
                if "relative_position_index" not in name:
                    assert torch.equal(loaded.body.features.state_dict()[name], value), name
            assert all(norm.weight.eq(1).all() for norm in loaded.norms)


def test_norms_on_swin_maps_are_loaded_where_they_are(classifiers, tmp_path):
    norms = {f"norm{i}.{key}": torch.randn(32 * 2**i) for i in range(4) for key in ("weight", "bias")}
    path = write(tmp_path / "w.pth", original_swin_names(classifiers["swin"].state_dict()) | norms)
    loaded = fresh("swin")
    load_backbone_weights(loaded, path)
    assert all(torch.equal(loaded.norms[i].weight, norms[f"norm{i}.weight"]) for i in range(4))


def test_wrong_entries_are_all_named(classifiers, tmp_path):
    state = dict(classifiers["resnet"].state_dict())
    del state["layer2.0.conv1.weight"]
    state["layer9.conv.weight"] = torch.zeros(2)
    state["layer3.1.bn1.running_mean"] = torch.zeros(7)
    path = write(tmp_path / "w.pth", state)
    with pytest.raises(ValueError) as error:
        load_backbone_weights(fresh("resnet"), path)
    first, *lines = str(error.value).splitlines()
    assert str(path) in first and len(lines) == 3
    assert "missing: layer2.0.conv1.weight" in lines[0]
    assert "unknown: layer9.conv.weight" in lines[1]
    assert "misshapen: layer3.1.bn1.running_mean is (7,), should be (256,)" in lines[2]


def test_weights_of_another_window_are_refused(classifiers, tmp_path):
    path = write(tmp_path / "w.pth", original_swin_names(classifiers["swin"].state_dict()))
    with pytest.raises(ValueError, match="misshapen: layers.0.blocks.0.attn.relative_position_bias_table is .49, 1."):
        load_backbone_weights(Swin(32, 2, 7, 0.3), path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_damaged_file(content, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    for trust_pickle in (False, True):
        with pytest.raises(InputError, match=re.escape(str(path))) as error:
            load_backbone_weights(fresh("resnet"), path, trust_pickle)
        assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_backbone_weights(fresh("resnet"), tmp_path / "none.pth")


def test_weights_by_name(classifiers, tmp_path, monkeypatch):
    """From torchvision's cache; without it and without a net, the error says where the file belongs."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "ResNet18_Weights.IMAGENET1K_V1"

    def offline(*args, **kwargs):
        raise URLError("no net")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(InputError, match="https://.*resnet18-.*with --backbone-weights, or put it into") as error:
        load_backbone_weights(fresh("resnet"), name)
    folder = Path(str(error.value).rsplit(" ", 1)[1])
    file = re.search(r"resnet18-\w+\.pth", str(error.value))[0]
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / file, classifiers["resnet"].state_dict())
    loaded = fresh("resnet")
    load_backbone_weights(loaded, name)
    assert torch.equal(loaded.body.layer4[1].conv2.weight, classifiers["resnet"].layer4[1].conv2.weight)

    with pytest.raises(ValueError, match="no weights of that name"):
        load_backbone_weights(fresh("resnet"), "ResNet18_Weights.IMAGENET9K")
    with pytest.raises(ValueError, match="no weights of that name"):
        load_backbone_weights(fresh("swin"), "Swin_L_Weights.DEFAULT")
