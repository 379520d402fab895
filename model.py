"""DI-MaskDINO (Fig. 2 of the paper) and Mask DINO: configuration, presets, the model, and its detections."""

import contextlib
import os
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed
from torchvision.ops import box_convert

from attention import inverse_sigmoid
from backbone import build_backbone
from bato import BATO
from decoder import Decoder, PredictionHeads
from denoising import denoising_queries
from di import CandidateTokens, TokenInteraction, boxes_from_masks, gather_tokens, select
from encoder import Encoder


class InputError(ValueError):
    """A checkpoint or setting that cannot be used; the message is one line: what, where, what to do."""


BOX_INIT = ("mask", "bitmask", "head")  # choices of the settings of these names
GUIDANCE = ("t_i", "t_s1", "t_s2", "q_bal")
POSITION_TOKENS = ("boxes", "random")


@dataclass(frozen=True)
class Config:
    """Every setting of model and losses; the defaults are the released DI-MaskDINO with ResNet-50.

    Settings whose name does not say all:
    box_init         "mask": boxes around the selected tokens' masks; "bitmask": these, one pixel wider and higher;
                     "head": the box head's, as in DINO
    guidance         Table 5: the pipeline is cut behind this stage, whose best k2 tokens both guide BATO and enter the
                     decoder; that sees T_bal from its first layer on. "t_i": one selection, the tokens T_i themselves;
                     "t_s1": one selection (Eq. 1); "t_s2": all selections; "q_bal": behind layer 1, nothing is cut
    position_tokens  Table 3: "random" puts learned boxes, random at first, in the place of the boxes of the selected
                     tokens as reference of the decoder's first layer; denoising queries keep theirs

    Raises InputError, a ValueError, for settings that do not go together.
    """

    num_classes: int = 80
    backbone: str = "resnet50"  # a ResNet of torchvision.models, or one of backbone.SWINS
    frozen_batch_norm: bool = True  # False: GroupNorm, to train from scratch
    hidden_dim: int = 256  # C, channels of tokens and queries
    num_heads: int = 8
    num_levels: int = 4  # of the encoder: C3...C6; 5: C2...C6
    num_points: int = 4  # sampling points per head and level
    encoder_layers: int = 6
    encoder_feedforward_dim: int = 2048
    di: bool = True  # De-Imbalance: token interaction and further selections (Eq. 2, 3); False: the last one alone
    box_init: str = "mask"  # boxes of the tokens of the first selection, see above
    selections: tuple[int, ...] = (600, 300)  # tokens of each (Eq. 1, 3), interaction between them; last = queries
    interaction_layers: int = 2  # before each selection but the first
    position_tokens: str = "boxes"  # of the decoder's input: of the selected tokens; or "random", see above
    bato: bool = True  # Balance-Aware Tokens Optimization (Eq. 5-8)
    guidance: str = "q_bal"  # stage whose best tokens guide BATO, see above
    gtg: bool = True  # guiding token generation (Eq. 5-7); False: the guiding queries themselves, in Eq. 8 (Table 6)
    num_guiding: int = 50  # queries that guide
    decoder_layers: int = 6
    feedforward_dim: int = 2048  # of interaction, decoder and BATO
    class_prior: float | None = None  # probability that the class head starts from; None: about 1/2
    denoising_queries: int = 100
    noise_scale: float = 0.4  # of denoising labels and boxes
    loss_points: int = 12544  # sampled per mask, in the matching and in the losses
    train_size: int = 1024  # side of the training crop, in pixels
    train_scale: tuple[float, float] = (0.1, 2.0)  # range of the large-scale jitter
    test_size: tuple[int, int] = (800, 1333)  # shorter side, and longer side at most, in evaluation
    grad_checkpoint: bool = False  # save memory in training: compute every layer's inner values once more
    class_weight: float = 4.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    box_loss_scale: float = 1.0  # factor on the weights of the box losses, not on those of the matching (Table 3)

    @property
    def stages(self):
        """Sizes of the selections that take place: one alone without DI, or where the pipeline is cut before it."""
        return self.selections if self.di and self.guidance in ("t_s2", "q_bal") else self.selections[-1:]

    def __post_init__(self):
        sizes = list(self.selections)
        if not sizes or sizes != sorted(sizes, reverse=True) or sizes[-1] < 1:
            raise InputError(f"selections {self.selections}: give sizes of 1 or more, none above the one before it")
        choices_of = {"box_init": BOX_INIT, "guidance": GUIDANCE, "position_tokens": POSITION_TOKENS}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} {getattr(self, name)!r}: choose from {', '.join(choices)}")
        if self.guidance != "q_bal" and not (self.di and self.bato):
            raise InputError(f"guidance {self.guidance}: cuts DI short and guides BATO, so that di and bato must be on")
        if self.guidance == "t_s2" and len(sizes) < 2:
            raise InputError(f"guidance t_s2: needs two selections or more, not {self.selections}")
        if not self.gtg and not self.bato:
            raise InputError("gtg False: is a change to BATO, so that bato must be on")
        if self.decoder_layers < 1:
            raise InputError(f"decoder_layers {self.decoder_layers}: at least 1")


PRESETS = {
    "dimaskdino_r50": Config(),
    "maskdino_r50": Config(di=False, bato=False, decoder_layers=9),
    "dimaskdino_swin_l": Config(backbone="swin_l_384"),
    "maskdino_swin_l": Config(
        backbone="swin_l_384", num_levels=5, box_init="bitmask", di=False, bato=False, decoder_layers=9
    ),
    # Trains from scratch on a laptop's CPU.
    "tiny": Config(
        num_classes=10,
        backbone="resnet18",
        frozen_batch_norm=False,
        hidden_dim=64,
        num_heads=4,
        encoder_layers=2,
        encoder_feedforward_dim=256,
        selections=(60, 30),
        num_guiding=15,
        decoder_layers=3,
        feedforward_dim=256,
        class_prior=0.01,
        class_weight=8.0,
        denoising_queries=30,
        loss_points=128,
        train_size=64,
        train_scale=(0.8, 1.25),
        test_size=(64, 128),
    ),
}

# Settings that decide which parameters there are, by the beginning of the parameters' names.
SETTINGS_OF = {
    "interactions.": "selections (di, guidance)",
    "bato.": "bato",
    "position_tokens.": "position_tokens",
    "decoder.layers.": "decoder_layers",
}
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


def check_config(path, checkpoint, config, **settings):
    """Raise InputError where a checkpoint was made with another Config or other of the settings, naming them."""
    found = checkpoint["config"] | checkpoint.get("settings", {})
    wanted = asdict(config) | settings
    different = [f"{name} {found.get(name)} instead of {value}" for name, value in wanted.items()
                 if found.get(name) != value]  # fmt: skip
    if different:
        raise InputError(
            f"{path}: is of another model or training ({', '.join(different)}); resume it with its own flags"
        )


def build_model(preset="dimaskdino_r50", **overrides):
    """A randomly initialised model of a preset; overrides are fields of `Config`, e.g. num_classes=8.

    Raises ValueError for an unknown preset, TypeError for an unknown field.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
    return DIMaskDINO(replace(PRESETS[preset], **overrides))


class DIMaskDINO(nn.Module):
    """The whole model; with `di` and `bato` off in its config it is Mask DINO."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone, config.frozen_batch_norm)
        self.encoder = Encoder(config, self.backbone.channels)
        self.candidates = CandidateTokens(config)
        self.heads = PredictionHeads(config)
        self.interactions = nn.ModuleList(TokenInteraction(config) for _ in config.stages[1:])
        self.bato = BATO(config) if config.bato else None
        self.decoder = Decoder(config)
        self.label_embedding = nn.Embedding(config.num_classes, config.hidden_dim)
        self.position_tokens = nn.Embedding(config.selections[-1], 4) if config.position_tokens == "random" else None
        if config.grad_checkpoint:
            for layer in chain(*self.backbone.stages, self.encoder.layers, self.decoder.layers):
                layer.forward = partial(recomputed, layer.forward, use_reentrant=False)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As in nn.Module; where entries are missing or unknown, the error begins with the settings behind that."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            differing = self.state_dict().keys() ^ state_dict.keys()
            named = [name for start, name in SETTINGS_OF.items() if any(key.startswith(start) for key in differing)]
            if named:
                raise RuntimeError(f"the weights are of a model with other {' and '.join(named)}: {error}") from None
            raise

    def batch(self, images):
        """List of (3, H, W) RGB images in [0, 1] -> normalised batch (B, 3, H, W), zero-padded to multiples of 32."""
        like = self.label_embedding.weight  # for its dtype and device
        mean, std = (like.new_tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        images = [(image.to(like) - mean) / std for image in images]
        H, W = (32 * -(-max(image.shape[d] for image in images) // 32) for d in (1, 2))
        return torch.stack([F.pad(image, (0, W - image.shape[2], 0, H - image.shape[1])) for image in images])

    def forward(self, images, targets=None, all_layers=False, max_instances=None):
        """Fig. 2, from images to predictions.

        images      list of (3, H, W) float RGB tensors in [0, 1], or one batch (B, 3, H, W)
        targets     in training, for the denoising queries: per image {"labels": (n,) int64, "boxes": (n, 4) normalised
                    cxcywh relative to the padded batch}
        all_layers  in evaluation mode, compute the predictions of every layer as in training
        max_instances  largest n, where the images are a part of a batch that counts as a whole

        Returns pred_logits (B, Q, classes), pred_boxes (B, Q, 4) normalised cxcywh relative to the padded batch,
        pred_masks (B, Q, H/4, W/4) logits, all of the last layer; selection: {first, second, guiding} int64 (B, k),
        each among the tokens before it (with three selections also third).
        In training or with `all_layers` also aux_outputs: the same predictions on the decoder's input and after each
        layer but the last; interm_outputs: those of the first selection; di_outputs: class and box after each
        interaction layer; and with targets dn_outputs: the predictions on the denoising queries, with aux_outputs.
        """
        heads, decoder = self.heads, self.decoder
        every = self.training or all_layers
        outputs, selection = {}, {}

        # Feature tokens extractor (Sec. 3.2.1)
        t_i, level_shapes, pixel_features = self.encoder(self.backbone(self.batch(images)))

        # De-Imbalance (Sec. 3.2.2)
        candidates, proposals = self.candidates(t_i, level_shapes)
        first, *further = self.config.stages
        t_s1, selection["first"] = select(candidates, heads.class_head(candidates), first)  # Eq. 1
        boxes = (heads.box_head(t_s1) + proposals[selection["first"]]).sigmoid()
        if every:
            outputs["interm_outputs"] = heads(t_s1, boxes, pixel_features)
        if self.config.box_init == "head":
            boxes = boxes.detach()
        else:
            boxes = boxes_from_masks(heads.masks(t_s1, pixel_features), self.config.box_init)
        queries = t_s1.detach()
        boxes = inverse_sigmoid(boxes).sigmoid()
        for number, (interaction, k) in enumerate(zip(self.interactions, further, strict=True), start=2):
            states = interaction(queries, boxes)  # Eq. 2
            if every:
                predictions = [interaction.predict(x, b, heads) for x, b in states]
                outputs["di_outputs"] = outputs.get("di_outputs", []) + predictions
            t_s1_sa, boxes = states[-1]
            scores = heads.class_head(interaction.norm(t_s1_sa))
            name = {2: "second", 3: "third"}.get(number, f"{number}th")
            queries, selection[name] = select(t_s1_sa, scores, k)  # Eq. 3: T_s2
            boxes = inverse_sigmoid(gather_tokens(boxes, selection[name])).sigmoid()

        # Ablations: other queries, boxes or guidance (Tables 3, 5)
        if self.config.guidance == "t_i":
            queries = gather_tokens(t_i, selection["first"]).detach()
        if self.position_tokens:
            boxes = self.position_tokens.weight[: queries.shape[1]].sigmoid().expand(len(queries), -1, -1)
        if self.config.guidance != "q_bal":  # the decoder sees T_bal from its first layer on
            args = queries, boxes, t_i, level_shapes, pixel_features, heads, decoder
            t_i, pixel_features, selection["guiding"] = self.bato(*args)

        # Denoising queries come first
        num_dn, attn_mask = 0, None
        if self.training:
            queries = queries + 0 * self.label_embedding.weight.sum()  # every parameter gets a gradient in every batch
        if self.training and targets is not None:
            settings = self.config.denoising_queries, self.config.noise_scale, max_instances
            denoising = denoising_queries(targets, self.label_embedding, queries.shape[1], *settings)
            if denoising:
                content, noisy_boxes, attn_mask, num_groups = denoising
                num_dn = content.shape[1]
                queries, boxes = torch.cat([content, queries], 1), torch.cat([noisy_boxes, boxes], 1)
        layers = [heads(queries, boxes, pixel_features)] if every else []

        # Residual fusion: the first decoder layer
        previous = boxes
        queries = decoder(0, queries, boxes, t_i, level_shapes, attn_mask)
        boxes = heads.refine(queries, boxes)
        q_bal = queries[:, num_dn:]  # Eq. 4
        if every or self.config.decoder_layers == 1:
            layers.append(heads.predict_layer(queries, previous, pixel_features))

        # Balance-Aware Tokens Optimization (Sec. 3.2.3)
        t_bal = t_i
        if self.bato and self.config.guidance == "q_bal":
            args = q_bal, boxes[:, num_dn:], t_i, level_shapes, pixel_features, heads, decoder
            t_bal, pixel_features, selection["guiding"] = self.bato(*args)  # Eq. 5-8

        # Decoder (Sec. 3.2.4): Q_ref, Eq. 9, and its predictions, Eq. 10, 11
        for layer in range(1, self.config.decoder_layers):
            previous = boxes
            reference = boxes.detach()
            queries = decoder(layer, queries, reference, t_bal, level_shapes, attn_mask)
            boxes = heads.refine(queries, reference)
            if every or layer == self.config.decoder_layers - 1:
                layers.append(heads.predict_layer(queries, previous, pixel_features))

        denoised = [{name: value[:, :num_dn] for name, value in layer.items()} for layer in layers]
        matching = [{name: value[:, num_dn:] for name, value in layer.items()} for layer in layers]
        outputs |= matching[-1] | {"selection": selection}
        if every:
            outputs["aux_outputs"] = matching[:-1]
        if num_dn:
            outputs["dn_outputs"] = denoised[-1] | {"aux_outputs": denoised[:-1], "num_groups": num_groups}
        return outputs


def postprocess(outputs, image_sizes, output_sizes, topk=100):
    """Detections of the last layer, at most `topk` per image, best first.

    image_sizes   (H, W) of every image before padding, as the model saw it
    output_sizes  (H, W) that boxes and masks are wanted in

    Returns per image {scores (k,), labels (k,) int64, boxes (k, 4) xyxy in output pixels, not clipped, masks (k, H, W)
    bool}. A score is the class score times the mean mask probability inside the mask.
    """
    scores = outputs["pred_logits"].sigmoid().flatten(1)  # (B, Q * classes)
    scores, picked = scores.topk(min(topk, scores.shape[1]), dim=1)
    num_classes = outputs["pred_logits"].shape[-1]
    padded_height, padded_width = (4 * n for n in outputs["pred_masks"].shape[-2:])
    detections = []
    for b, ((height, width), (out_height, out_width)) in enumerate(zip(image_sizes, output_sizes, strict=True)):
        query, labels = picked[b] // num_classes, picked[b] % num_classes
        boxes = box_convert(outputs["pred_boxes"][b, query], "cxcywh", "xyxy")
        scale = (padded_width * out_width / width, padded_height * out_height / height)
        masks = outputs["pred_masks"][b, query][:, None]  # (k, 1, H/4, W/4)
        masks = F.interpolate(masks, (padded_height, padded_width), mode="bilinear", align_corners=False)
        masks = masks[..., :height, :width]
        masks = F.interpolate(masks, (out_height, out_width), mode="bilinear", align_corners=False)[:, 0]
        inside = masks > 0
        area = inside.sum((1, 2)).to(masks)
        quality = (masks.sigmoid() * inside).sum((1, 2)) / (area + 1e-6)
        final, order = (scores[b] * quality).sort(descending=True, stable=True)
        detections.append(
            {
                "scores": final,
                "labels": labels[order],
                "boxes": (boxes * boxes.new_tensor(scale * 2))[order],
                "masks": inside[order],
            }
        )
    return detections


def read_checkpoint(path):
    """The dictionary in a checkpoint file of `train.py` or `convert.py`, on the CPU.

    {"model": state dict, "config": fields of Config, "classes": names, ...}, see `train.py`.
    Raises InputError for a missing, damaged or foreign file; nothing in the file is executed.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; give the checkpoint file in it") from None
    except Exception as error:  # torch.load raises whatever zip, pickle and its own checks come across
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable checkpoint, perhaps truncated ({reason[:100]})") from None
    if not isinstance(checkpoint, dict) or not {"model", "config", "classes"} <= checkpoint.keys():
        raise InputError(f"{path}: not a checkpoint of this project; run convert.py on a released one")
    return checkpoint


def load_model(path, device="cpu"):
    """The model of a checkpoint file, in evaluation mode, and the checkpoint's dictionary. Raises InputError."""
    checkpoint = read_checkpoint(path)
    try:
        model = DIMaskDINO(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: its weights and its config do not fit ({reason})") from None
    return model.to(device).eval(), checkpoint


def save_checkpoint(path, checkpoint, keep=None):
    """Write a checkpoint so that `path` always holds a whole one: to a temporary file first, then renamed.

    keep: a name in the same folder for the file that was at `path`. Raises InputError where the disk does not take it;
    what was at `path` is still there then.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            link(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns some failures of the disk into RuntimeError
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free / 2**20
            temporary.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or f"{str(error).splitlines()[0][:100]}; {free:.0f} MiB were free"
            raise InputError(f"{path}: cannot be written ({reason}); what was there before is untouched") from None
        raise


def link(path, name):
    """Let `name`, in the same folder, be the file that `path` is now, without a copy where the disk has hard links."""
    temporary = path.with_name(f"{name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, path.with_name(name))


def choose_device(name):
    """torch.device of "cpu", "cuda", ... or, for "auto", a GPU if there is one. Raises InputError for one not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: no such device; use cpu, cuda or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no usable CUDA GPU here; use --device cpu")
    return device
