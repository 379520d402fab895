"""Denoising queries (DN-DETR), in training only: noisy ground truth that the decoder learns to restore."""

import torch
from torch.nn.utils.rnn import pad_sequence

from attention import inverse_sigmoid


def denoising_queries(targets, label_embedding, num_matching, num_queries=100, noise_scale=0.4, max_instances=None):
    """Noisy copies of every image's instances, in groups that each hold all of them.

    targets          per image {"labels": (n,) int64, "boxes": (n, 4) normalised cxcywh}
    label_embedding  nn.Embedding of the classes, of width C
    num_matching     number of matching queries that follow the denoising ones
    num_queries      about how many there are: num_queries // (largest n) groups of (largest n) queries
    noise_scale      boxes move and scale by up to this fraction (centres: of half their size); labels become a random
                     class with probability noise_scale / 2; 0 switches all noise off
    max_instances    largest n; that of these targets, unless they are a part of a batch that counts as a whole

    Returns (content (B, D, C), boxes (B, D, 4), attn_mask (D + num_matching, D + num_matching) bool, True where hidden,
    number of groups), or None where there is nothing to restore. Query g * n_max + i is the i-th instance in group g;
    images with fewer instances are padded with content 0
    and, as the zeros are logits, box 0.5.
    """
    n_max = max(len(t["labels"]) for t in targets) if max_instances is None else max_instances
    groups = num_queries // n_max if n_max else 0
    if groups == 0:
        return None

    def padded(values):  # (B, D, ...)
        longest = values[0].new_zeros(n_max, *values[0].shape[1:])
        values = pad_sequence([longest, *values], batch_first=True)[1:]
        return values.repeat(1, groups, *[1] * (values.dim() - 2))

    labels, boxes = (padded([t[name] for t in targets]) for name in ("labels", "boxes"))
    real = padded([torch.ones_like(t["labels"]) for t in targets])[..., None]

    random_labels = torch.randint_like(labels, label_embedding.num_embeddings)
    labels = torch.where(torch.rand(labels.shape, device=labels.device) < noise_scale / 2, random_labels, labels)
    reach = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], -1)
    boxes = (boxes + (2 * torch.rand_like(boxes) - 1) * reach * noise_scale).clamp(0, 1)

    content = label_embedding(labels) * real
    boxes = (inverse_sigmoid(boxes.to(content.dtype)) * real).sigmoid()

    group = torch.arange(groups, device=labels.device).repeat_interleave(n_max)
    group = torch.cat([group, group.new_full((num_matching,), -1)])  # matching queries are group -1
    # Seen by everyone: the matching queries. Seen only by their own group: the denoising queries.
    attn_mask = (group[:, None] != group[None]) & (group[None] >= 0)
    return content, boxes, attn_mask, groups
