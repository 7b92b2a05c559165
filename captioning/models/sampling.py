"""Sampling by random numbers that are given: the samples of an image are the same in any batch, but for rounding."""

import torch
from transformers import GenerationConfig, LogitsProcessor


class DrawTokens(LogitsProcessor):
    """Draws a token for each row, and leaves of its scores that one alone, for `generate` to take.

    Args:
        config: `temperature`, `top_k` (0: all) and `top_p`, with the meaning of stock's `generate`.
        uniforms: float `[R, T]` from 0 to 1, for T tokens of R captions; at 0 the most probable token is drawn.
    """

    def __init__(self, config: GenerationConfig, uniforms: torch.Tensor):
        self.config, self.uniforms = config, uniforms
        self.rows: slice | torch.Tensor = slice(None)  # that are still decoded; `decode_captions` sets it
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores `[R, V]` that are 0 for the drawn tokens, elsewhere -inf."""
        number = min(self.config.top_k or scores.shape[1], scores.shape[1])
        ranked, tokens = (scores.float() / self.config.temperature).topk(number)  # the most probable first
        probs = ranked.softmax(dim=-1)
        kept = probs.cumsum(dim=-1) - probs < self.config.top_p
        cumulative = (probs * kept).cumsum(dim=-1)
        place = self.uniforms[self.rows, self.step, None] * cumulative[:, -1:]
        self.step += 1
        index = (cumulative <= place).sum(dim=-1, keepdim=True)
        index = torch.minimum(index, kept.sum(dim=-1, keepdim=True) - 1)  # where rounding has made the place the last
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens.gather(1, index), 0.0)
