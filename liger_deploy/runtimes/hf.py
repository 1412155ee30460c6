"""Any Session as a Hugging Face model: `generate()`, and evaluation harnesses that score a PreTrainedModel.

It holds no weights. A session remembers tokens, so `generate()` needs no cache of Hugging Face's: whatever each row has
in common with what the session was last fed is not fed again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from liger_deploy.runtimes.session import BaseSession, Logits


class SessionModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A Session behind Hugging Face's interface, on the CPU; it owns the session's state."""

    main_input_name = "input_ids"

    def __init__(self, session: BaseSession) -> None:
        model, text = session.manifest.model, session.manifest.generation
        config = PretrainedConfig(
            vocab_size=model.vocab_size,
            num_hidden_layers=model.layers,
            bos_token_id=text.bos_token_id if text.bos_token_id >= 0 else None,
            eos_token_id=text.eos_token_ids or None,
            use_cache=False,
        )
        config.model_type = "liger_session"
        super().__init__(config)
        self.generation_config.use_cache = False
        self.session = session
        self._fed: list[list[int]] = []

    @property
    def device(self) -> torch.device:
        """Where tensors go and come from."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0, **_: Any
    ) -> CausalLMOutput:
        """Logits of tokens [B,T] int64, float32 [B,T,N]; [B,1,N], the last alone, with `logits_to_keep=1`.

        `attention_mask` [B,T] marks padding (0), which every row may have on either side. Raises as `Session.prefill`.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
        if logits_to_keep == 1:
            return CausalLMOutput(logits=torch.from_numpy(self._last(rows))[:, None])
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for t, step in enumerate(self._every(rows)):
            for row, values in enumerate(step):
                place = mask[row].nonzero()[:, 0]
                if t < len(place):
                    logits[row, place[t]] = torch.from_numpy(values)
        return CausalLMOutput(logits=logits)

    def _last(self, rows: list[list[int]]) -> Logits:
        """Logits after each row's last token."""
        new = [row[len(fed) :] for row, fed in zip(rows, self._fed, strict=False)]
        continues = len(rows) == len(self._fed) and all(
            row[: len(fed)] == fed and tail for row, fed, tail in zip(rows, self._fed, new, strict=True)
        )
        if not continues:
            self.session.reset()
            new = rows
        self._fed = []  # until the session has taken them
        lengths = [len(row) for row in new]
        tokens = np.zeros((len(new), max(lengths)), np.int64)
        for i, row in enumerate(new):
            tokens[i, : len(row)] = row
        logits = self.session.prefill(tokens, lengths)
        self._fed = [list(row) for row in rows]
        return logits

    def _every(self, rows: list[list[int]]) -> list[Logits]:
        """Logits after every token: a session gives those of the last one it is fed, so they are fed one by one."""
        self.session.reset()
        self._fed = []
        longest = max(len(row) for row in rows)
        return [self.session.step([row[min(t, len(row) - 1)] for row in rows]) for t in range(longest)]
