"""LoLCATs (arXiv 2410.10254): linear attention with learned feature maps beside a softmax window, one denominator.

    y_t = (gamma sum_win e^(s_ti - m_t) v_i + f_q(q_t) S_(t-W)) / (gamma sum_win e^(s_ti - m_t) + f_q(q_t) z_(t-W))
    f(x) = [softmax(x A), softmax(-x A)], at least 1e-12

s are the window's scores, m_t their largest, S and z the sums of f_k(k_i)^T v_i and f_k(k_i) over the tokens that left
the window. Queries and keys are rotated by absolute position before the maps; maps and gamma belong to a query head.

Shape legend: B batch, T time, G KV heads, R query heads per KV head, H = G * R, K key dim, V value dim, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from liger_deploy.model import recurrence

LEAST = 1e-12  # of a feature
WINDOW_FACTOR = -2.1972  # gamma = sigmoid of it = 0.1, as the authors' code begins


class Lolcats(nn.Module):
    """One layer's learned maps and window factor: the parameters that the other structures do not have."""

    def __init__(self, heads: int, head_dim: int, features: int, inverse_frequency: Tensor, rope_scale: float) -> None:
        super().__init__()
        identity = torch.eye(head_dim, features).repeat(heads, 1, 1)
        self.map_q = nn.Parameter(identity.clone())
        self.map_k = nn.Parameter(identity.clone())
        self.window_factor = nn.Parameter(torch.full((heads,), WINDOW_FACTOR))
        self.turns: Tensor  # rotations a token, float64, [rotary dim / 2]
        self.register_buffer("turns", inverse_frequency.double() / (2 * math.pi), persistent=False)
        self.rope_scale = rope_scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Lolcats:
        """Move the frequencies with the module, but keep them float64: token 1,000,000 needs their last digits."""
        turns = self.turns
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.turns = turns.to(self.turns.device)
        return self

    def forward(
        self,
        q_BTGRK: Tensor,
        near: tuple[Tensor, Tensor],
        gone_k_BTGK: Tensor,
        gone_v_BTGV: Tensor,
        position_BT: Tensor,
        window: int,
        keep_BT: Tensor,
        restart_BT: Tensor | None,
        state: tuple[Tensor, ...],
        chunked: recurrence.Recurrence = recurrence.gated_chunked,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Output [B,T,G,R,V] float32, and the sums S [B,H,2F,V] and z [B,H,2F] after T tokens.

        near: the window's output [B,T,G,R,V] and largest weights [B,T,G,R].
        gone_k, gone_v: key (before RoPE) and value that leave the window as each token enters, where `keep`.
        position: of the queries; the keys' lie `window` before. restart: where a new document begins.
        """
        queries = q_BTGRK.shape[3]
        q_BTHF = self._features(self._rotate(q_BTGRK.flatten(2, 3), position_BT), self.map_q)
        k_BTHK = self._rotate(gone_k_BTGK, position_BT - window).repeat_interleave(queries, 2)
        k_BTHF = self._features(k_BTHK, self.map_k) * keep_BT[:, :, None, None]
        v_BTHV = torch.nn.functional.pad(gone_v_BTGV.float(), (0, 1), value=1.0).repeat_interleave(queries, 2)
        sums_BHFV = torch.cat([state[0], state[1][..., None]], -1)
        g_BTH1 = torch.zeros_like(k_BTHF[..., :1])
        if restart_BT is not None:
            g_BTH1 = g_BTH1.masked_fill(restart_BT[:, :, None, None], recurrence.FORGET)
        if restart_BT is None and q_BTHF.shape[1] == 1:
            step = (q_BTHF[:, 0, :, None], k_BTHF[:, 0], v_BTHV[:, 0], g_BTH1[:, 0], sums_BHFV)
            far_BHRV, sums_BHFV = recurrence.gated_step(*step)
            far_BTHV = far_BHRV.transpose(1, 2)
        else:
            far_BTHRV, sums_BHFV = chunked(q_BTHF[:, :, :, None], k_BTHF, v_BTHV, g_BTH1, sums_BHFV)
            far_BTHV = far_BTHRV[:, :, :, 0]
        out = self._mix(near, far_BTHV.unflatten(2, (-1, queries)))
        return out, (sums_BHFV[..., :-1], sums_BHFV[..., -1])

    def _mix(self, near: tuple[Tensor, Tensor], far_BTGRV: Tensor) -> Tensor:
        near_BTGRV, peak_BTGR = near
        gamma_GR = self.window_factor.float().sigmoid().view(near_BTGRV.shape[2:4])
        mass_BTGR1 = (gamma_GR / peak_BTGR)[..., None]
        return (mass_BTGR1 * near_BTGRV.float() + far_BTGRV[..., :-1]) / (mass_BTGR1 + far_BTGRV[..., -1:])

    def _features(self, x_BTHK: Tensor, map_HKF: Tensor) -> Tensor:
        x_BTHF = (x_BTHK.transpose(1, 2) @ map_HKF.float()).transpose(1, 2)
        return torch.cat([x_BTHF.softmax(-1), (-x_BTHF).softmax(-1)], -1).clamp(min=LEAST)

    def _rotate(self, x_BTHK: Tensor, position_BT: Tensor) -> Tensor:
        """Rotary embedding at absolute positions, angles in float64."""
        x_BTHK = x_BTHK.float()
        if not self.turns.numel():
            return x_BTHK
        turns_BTK = position_BT[..., None].double() * self.turns
        angle_BT1K = ((turns_BTK - turns_BTK.floor()) * (2 * math.pi)).float()[:, :, None]
        cos, sin = angle_BT1K.cos() * self.rope_scale, angle_BT1K.sin() * self.rope_scale
        half = self.turns.shape[0]
        a, b, rest = x_BTHK[..., :half], x_BTHK[..., half : 2 * half], x_BTHK[..., 2 * half :]
        turned = [a * cos - b * sin, b * cos + a * sin]
        return torch.cat([*turned, rest], -1) if rest.shape[-1] else torch.cat(turned, -1)
