"""Every setting of model, losses and images: the dataclass and its presets."""

from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin


class InputError(ValueError):
    """A setting, checkpoint or file that cannot be used; the message is one line: what, where, what to do."""


def setting(default, meaning, least=1):
    """A field of `Config`: its default, its meaning, which is also the help of its flag, and its least value."""
    return field(default=default, metadata={"help": meaning, "least": least})


@dataclass(frozen=True)
class Config:
    """Every setting; the defaults are the released DI-MaskDINO with ResNet-50.

    Raises InputError, a ValueError, for values out of their range and settings that do not go together. Without
    De-Imbalance only the last of `selections` takes place, and is all that is kept.
    """

    num_classes: int = setting(80, "Classes; training takes those of the data set.")
    backbone: str = setting("resnet50", "A ResNet of torchvision, mobilenet_v2, or a Swin: swin_t, ..., swin_l_384.")
    frozen_batch_norm: bool = setting(True, "Batch norm with fixed statistics; without: GroupNorm, from scratch.")
    hidden_dim: int = setting(256, "C, channels of tokens and queries.")
    num_heads: int = setting(8, "Attention heads.")
    num_levels: Literal[4, 5] = setting(4, "Maps that the encoder sees: 4: C3...C6; 5: C2...C6.")
    num_points: int = setting(4, "Sampling points of deformable attention per head and level.")
    encoder_layers: int = setting(6, "Layers of the encoder.")
    encoder_feedforward_dim: int = setting(2048, "Inner channels of the encoder's feed-forward networks.")
    di: bool = setting(True, "De-Imbalance: token interaction and further selections, Eq. 2 and 3 (Table 4).")
    selections: tuple[int, ...] = setting((600, 300), "Tokens of each selection; of the last: queries (Table 7, 8).")
    box_init: Literal["mask", "bitmask", "head"] = setting(
        "mask", "Boxes of the first selection: around its masks; the same, a pixel wider and higher; of the box head."
    )
    interaction_layers: int = setting(2, "Self-attention layers before each selection but the first, Eq. 2.")
    position_tokens: Literal["boxes", "random"] = setting(
        "boxes", "Boxes of the decoder's input: of the selected tokens; or learned ones, random at first (Table 3)."
    )
    bato: bool = setting(True, "Balance-Aware Tokens Optimization, Eq. 5 to 8 (Table 4).")
    guidance: Literal["t_s1", "t_s2", "q_bal"] = setting(
        "q_bal", "Stage whose best tokens guide BATO, with their boxes (Table 5; its T_i is --no-di)."
    )
    gtg: bool = setting(True, "Guiding token generation, Eq. 5 to 7; without: the queries themselves guide (Table 6).")
    num_guiding: int = setting(50, "Queries that guide BATO.")
    decoder_layers: int = setting(6, "Layers of the decoder, the first of which is Eq. 4 (Table 9).")
    feedforward_dim: int = setting(2048, "Inner channels of the feed-forward networks behind the encoder.")
    class_prior: float | None = setting(None, "Probability that the class head starts from; without: about 1/2.", 1e-6)
    denoising_queries: int = setting(100, "Denoising queries in training, about so many; 0: none.", 0)
    noise_scale: float = setting(0.4, "Noise of the denoising queries' boxes and labels, 0 to 1.", 0)
    loss_points: int = setting(12544, "Points sampled per mask, in matching and losses.")
    train_size: int = setting(1024, "Side of the training crops in pixels.")
    train_scale: tuple[float, float] = setting((0.1, 2.0), "Range of the scale jitter before the crop.", 1e-3)
    test_size: tuple[int, int] = setting((800, 1333), "Shorter side in evaluation, and longer side at most, in pixels.")
    grad_checkpoint: bool = setting(False, "Save memory in training: compute the layers twice instead of storing them.")
    class_weight: float = setting(4.0, "Weight of the class loss and of its matching cost.", 0)
    box_weight: float = setting(5.0, "Weight of the L1 loss of boxes and of its matching cost.", 0)
    giou_weight: float = setting(2.0, "Weight of the GIoU loss and of its matching cost.", 0)
    mask_weight: float = setting(5.0, "Weight of the cross-entropy of masks and of its matching cost.", 0)
    dice_weight: float = setting(5.0, "Weight of the dice loss and of its matching cost.", 0)
    box_loss_scale: float = setting(1.0, "Factor on the weights of both box losses, not of the matching (Table 3).", 0)

    def __post_init__(self):
        for entry in fields(self):
            if isinstance(value := getattr(self, entry.name), list):  # of JSON, or of argparse's nargs
                object.__setattr__(self, entry.name, value := tuple(value))
            check_value(entry, value)
        sizes = list(self.selections)
        if not sizes or sizes != sorted(sizes, reverse=True):
            raise InputError(f"selections {self.selections}: give one size or more, none above the one before it")
        if self.hidden_dim % 32 or self.hidden_dim % self.num_heads:
            raise InputError(f"hidden_dim {self.hidden_dim}: must be a multiple of 32 and num_heads {self.num_heads}")
        if self.noise_scale > 1:
            raise InputError(f"noise_scale {self.noise_scale}: must be 1 or less")
        if (self.class_prior or 0) >= 1:
            raise InputError(f"class_prior {self.class_prior}: must be below 1")
        if self.train_scale[0] > self.train_scale[1]:
            raise InputError(f"train_scale {self.train_scale}: the smaller number comes first")
        if self.guidance != "q_bal" and not (self.di and self.bato and sizes[1:]):
            raise InputError(f"guidance {self.guidance}: needs di and bato, and two selections, not {self.selections}")
        if not self.gtg and not self.bato:
            raise InputError("gtg False: is a change to BATO, so that bato must be on")
        if self.bato and self.decoder_layers < 2:
            raise InputError(f"decoder_layers {self.decoder_layers}: BATO acts between the first two; give 2 or more")
        if not self.di:
            object.__setattr__(self, "selections", self.selections[-1:])


def check_value(entry, value):
    """Raise InputError for a value of the field that is none of its choices or below its least."""
    if get_origin(entry.type) is Literal and value not in get_args(entry.type):
        raise InputError(f"{entry.name} {value!r}: choose from {', '.join(map(str, get_args(entry.type)))}")
    least = entry.metadata["least"]
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not isinstance(number, bool) and not number >= least:  # NaN is not
            raise InputError(f"{entry.name} {value}: must be {least} or more")


PRESETS = {
    "dimaskdino_r50": Config(),
    "maskdino_r50": Config(di=False, bato=False, decoder_layers=9),
    "dimaskdino_swin_l": Config(backbone="swin_l_384"),
    "maskdino_swin_l": Config(backbone="swin_l_384", num_levels=5, box_init="bitmask", di=False, bato=False,
                              decoder_layers=9),
    # Trains on a few hundred photographs from ImageNet weights, on a CPU or a small GPU.
    "small": Config(
        backbone="mobilenet_v2", hidden_dim=128, class_prior=0.01,
        encoder_layers=3, encoder_feedforward_dim=512, selections=(100, 50), num_guiding=15,
        decoder_layers=4, feedforward_dim=512, denoising_queries=50, loss_points=1024,
        train_size=224, train_scale=(0.6, 1.4), test_size=(224, 320),
    ),
    # Trains from scratch on a laptop's CPU.
    "tiny": Config(
        num_classes=10, backbone="resnet18", frozen_batch_norm=False, hidden_dim=64, num_heads=4, class_prior=0.01,
        encoder_layers=2, encoder_feedforward_dim=256, selections=(60, 30), num_guiding=15,
        decoder_layers=3, feedforward_dim=256, class_weight=8.0, denoising_queries=30, loss_points=128,
        train_size=64, train_scale=(0.8, 1.25), test_size=(64, 128),
    ),
}  # fmt: skip
