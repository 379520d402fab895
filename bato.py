"""Balance-Aware Tokens Optimization (Sec. 3.2.3): guiding tokens refine the feature tokens and pixel features."""

import torch
from torch import nn

from attention import FeedForward, sine_position, xavier_matrices_
from di import gather_tokens, select
from encoder import Features, GroupNorm, feed_forward, tokens_to_map
from precision import in_full_precision


class BATO(nn.Module):
    """T_g from the best queries (Eq. 5-7), T_bal = MHCA(T_i, T_g) (Eq. 8), and the pixel features that follow T_bal."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_dim
        self.num_guiding, self.gtg = config.num_guiding, config.gtg
        self.cross_attn = nn.MultiheadAttention(C, config.num_heads, batch_first=True)
        self.norm = nn.LayerNorm(C)
        self.ffn = FeedForward(C, config.feedforward_dim)
        self.pixel_output = nn.Sequential(nn.Conv2d(C, C, 3, padding=1, bias=False), GroupNorm(32, C), nn.ReLU(True))
        xavier_matrices_(self.cross_attn)
        xavier_matrices_(self.ffn)
        nn.init.kaiming_uniform_(self.pixel_output[0].weight, a=1)

    def forward(self, queries, features, heads, query_pos):
        """queries: `Queries` with Q_bal and the boxes that its layer refined; features: `Features` with T_i and F.

        heads, query_pos: the model's prediction heads and the decoder's position MLP; they are the networks of Eq. 5
        and 6. With `guidance` other than "q_bal" (Table 5) the tokens of that stage and their boxes stand for Q_bal.
        Returns the `Features` with T_bal and F', and the indices of the guiding queries, int64 (B, G).
        """
        t_i, level_shapes, pixel_features = features
        best, guiding = select(queries.content, in_full_precision(heads.class_head, queries.content), self.num_guiding)
        t_g_mask = heads.mask_head(best)  # Eq. 5, (B, G, C), G = min(num_guiding, Q)
        t_g_box = query_pos(gather_tokens(queries.boxes.detach(), guiding))  # Eq. 6
        t_g = t_g_mask + t_g_box  # Eq. 7
        if not self.gtg:  # Table 6: without guiding token generation the queries are key and value
            t_g = t_g_mask = best

        position = torch.cat([sine_position(*shape, t_i.shape[-1], self.norm.weight) for shape in level_shapes])
        attended = self.cross_attn(t_i + position, t_g, t_g_mask, need_weights=False)[0]
        t_bal = feed_forward(self.ffn, self.norm(t_i + attended))  # Eq. 8

        finest = tokens_to_map(t_bal, level_shapes, -1, pixel_features.shape[-2:])  # C3's part, with five levels C2's
        return Features(t_bal, level_shapes, self.pixel_output(pixel_features + finest)), guiding
