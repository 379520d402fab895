"""Denoising queries (DN-DETR), in training only: noisy ground truth that the decoder learns to restore."""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from attention import inverse_sigmoid
from di import Queries


class Denoising(nn.Module):
    """Puts noisy copies of every image's instances in front of the queries, in groups that each hold all of them."""

    def __init__(self, config):
        super().__init__()
        self.num_queries, self.noise_scale = config.denoising_queries, config.noise_scale
        self.label_embedding = nn.Embedding(config.num_classes, config.hidden_dim)

    def forward(self, queries, targets):
        """queries: `Queries` (B, Q, ...). targets: per image {"labels": (n,) int64, "boxes": (n, 4) normalised cxcywh},
        or None.

        Returns the `Queries` (B, D + Q, ...) with the denoising ones in front, their number D, the number of groups,
        and the attention mask (D + Q, D + Q) bool, True where hidden. Denoising query g * n_max + i is the i-th
        instance in group g; images with fewer instances are padded with content 0 and, as the zeros are logits, box
        0.5. Outside training, without targets, or where all images are empty or one alone has more instances than
        there may be denoising queries: the queries alone, 0, 0, None.
        """
        if not self.training:
            return queries, 0, 0, None
        content = queries.content + 0 * self.label_embedding.weight.sum()  # a gradient, also in batches without groups
        n_max = max(len(t["labels"]) for t in targets) if targets else 0
        groups = self.num_queries // n_max if n_max else 0
        if groups == 0:
            return Queries(content, queries.boxes), 0, 0, None

        labels, boxes = (padded([t[name] for t in targets], groups) for name in ("labels", "boxes"))
        real = padded([torch.ones_like(t["labels"]) for t in targets], groups)[..., None]
        labels, boxes = self.noisy(labels, boxes)
        noisy_content = self.label_embedding(labels) * real
        noisy_boxes = (inverse_sigmoid(boxes.to(noisy_content.dtype)) * real).sigmoid()
        queries = Queries(torch.cat([noisy_content, content], 1), torch.cat([noisy_boxes, queries.boxes], 1))
        return queries, groups * n_max, groups, group_mask(groups, n_max, content.shape[1], content.device)

    def noisy(self, labels, boxes):
        """Labels (B, D) become a random class with probability noise_scale / 2; the centres of boxes (B, D, 4) move by
        up to noise_scale of half their size, their sizes change by up to noise_scale of themselves, clamped to [0, 1].
        """
        random_labels = torch.randint_like(labels, self.label_embedding.num_embeddings)
        replaced = torch.rand(labels.shape, device=labels.device) < self.noise_scale / 2
        reach = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], -1)
        boxes = (boxes + (2 * torch.rand_like(boxes) - 1) * reach * self.noise_scale).clamp(0, 1)
        return torch.where(replaced, random_labels, labels), boxes


def padded(values, groups):
    """Per image (n, ...), zero-padded to the largest n and repeated for every group: (B, groups * n_max, ...)."""
    values = pad_sequence(values, batch_first=True)
    return values.repeat(1, groups, *[1] * (values.dim() - 2))


def group_mask(groups, n_max, num_matching, device=None):
    """Which queries (rows) must not see which (columns): matching queries are seen by all, denoising ones by their own
    group alone. (D + num_matching, D + num_matching) bool with D = groups * n_max, True where hidden.
    """
    group = torch.arange(groups, device=device).repeat_interleave(n_max)
    group = torch.cat([group, group.new_full((num_matching,), -1)])  # matching queries are group -1
    return (group[:, None] != group[None]) & (group[None] >= 0)
