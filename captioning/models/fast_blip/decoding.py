"""Greedy search, samples and beam search, token for token as `transformers` does, at a fraction of its cost.

What stock `generate` spends on BLIP, and how it is saved here:

* It copies the cross-attention keys and values of each image for each of its beams and gathers all of them again after
  each token. Here they are computed once per image, and its beams, or samples, attend to them together.
* It gathers the self-attention cache after each token, so that each beam's row holds the keys of its own ancestors.
  Here keys stay where they were written, and a mask says which of them are a beam's ancestors.
* It decodes all images of a batch until the last is finished. Here a finished image leaves the batch.

Tokens are chosen by stock's own code: its logits processors, its stopping criteria and its rules by which beams are
ranked and finished. So a setting means the same in both.
"""

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.models.blip.modeling_blip_text import BlipTextLayer, BlipTextLMHeadModel

from captioning.models.captioner import DrawTokens


CrossAttention = list[tuple[torch.Tensor, torch.Tensor]]
# The settings with which `decode_captions` is tested against stock
KNOWN_SETTINGS = (
    {"do_sample", "num_beams", "num_return_sequences", "early_stopping", "length_penalty", "repetition_penalty"}
    | {"max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    | {"temperature", "top_k", "top_p", "suppress_tokens"}
)


def can_decode(config: GenerationConfig, *processors: LogitsProcessor) -> bool:
    """Tell whether `decode_captions` knows all that `config` sets; it samples by a `DrawTokens` alone."""
    draws = any(isinstance(process, DrawTokens) for process in processors)
    return bool(config.do_sample) == draws and config.to_diff_dict().keys() <= KNOWN_SETTINGS


def project_images(text_decoder: BlipTextLMHeadModel, image_embeds: torch.Tensor) -> CrossAttention:
    """Project `image_embeds` `[B, P + 1, D]` into the keys and values of each layer's cross-attention.

    Returns:
        For each layer the keys `[B, H, d, P + 1]`, ready to be multiplied by queries from the left, and the values
        `[B, H, P + 1, d]`.
    """
    projected = []
    for layer in text_decoder.bert.encoder.layer:
        attention = layer.crossattention.self
        heads = (attention.num_attention_heads, attention.attention_head_size)
        keys = attention.key(image_embeds).unflatten(-1, heads).permute(0, 2, 3, 1).contiguous()
        values = attention.value(image_embeds).unflatten(-1, heads).transpose(1, 2).contiguous()
        projected.append((keys, values))
    return projected


class CaptionDecoder:
    """The text decoder with a cache of the keys and values of all tokens so far.

    The beams of an image share one row of the cache, and each token takes one slot of it.

    Args:
        text_decoder: supplies the layers.
        cross_attention: from `project_images`; `keep` overwrites it.
        num_slots: the most tokens that an image can have, those of all its beams together.
    """

    def __init__(self, text_decoder: BlipTextLMHeadModel, cross_attention: CrossAttention, num_slots: int):
        self.model, self.cross_attention = text_decoder, cross_attention
        # Keys and values [B, H, slots, d] of each layer. Not filled: on a CPU, slots never used then take no memory
        self.cache = [
            tuple(values.new_empty(*values.shape[:2], num_slots, values.shape[3]) for _ in range(2))
            for _, values in cross_attention
        ]
        self.used = 0  # slots

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states `[B, N, D]` of captions or prompts `[B, N]`, padded on the right.

        Padding needs no mask: attention is causal, so no token attends to what follows it.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self(tokens, positions, (positions <= positions[:, None])[None])

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Decode N more tokens of each image, which take the next N slots of the cache.

        Args:
            tokens: `[B, N]`: a prompt of N tokens, or the last token of each of N beams.
            positions: `[N]`, or one for all N, in their captions.
            visible: bool `[B or 1, N, slots]`, the slots that each token attends to, its own among them.

        Returns:
            The last hidden states `[B, N, D]`.
        """
        start, self.used = self.used, self.used + tokens.shape[1]
        hidden = self.model.bert.embeddings(input_ids=tokens, position_ids=positions[None])
        mask = torch.zeros(visible.shape, dtype=hidden.dtype, device=hidden.device)
        mask = mask.masked_fill_(~visible, float("-inf"))[:, None]
        for index, layer in enumerate(self.model.bert.encoder.layer):
            hidden = self._layer(layer, index, hidden, start, mask)
        return hidden

    def _layer(
        self, layer: BlipTextLayer, index: int, hidden: torch.Tensor, start: int, mask: torch.Tensor
    ) -> torch.Tensor:
        attention = layer.attention.self
        heads = (attention.num_attention_heads, attention.attention_head_size)
        query, key, value = (
            linear(hidden).unflatten(-1, heads).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        )
        keys, values = (tensor[:, :, : self.used] for tensor in self.cache[index])
        keys[:, :, start:], values[:, :, start:] = key, value
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        hidden = layer.attention.output(context.transpose(1, 2).flatten(2), hidden)

        # One product for all beams of an image; for so few rows a fused kernel is not faster
        attention = layer.crossattention.self
        query = attention.query(hidden).unflatten(-1, heads).transpose(1, 2)
        image_keys, image_values = self.cross_attention[index]
        weights = torch.matmul(query / heads[1] ** 0.5, image_keys).softmax(dim=-1)
        context = torch.matmul(weights, image_values)
        hidden = layer.crossattention.output(context.transpose(1, 2).flatten(2), hidden)
        return layer.feed_forward_chunk(hidden)

    def keep(self, done: torch.Tensor) -> torch.Tensor:
        """Drop the finished images, bool `done` `[B]`, and return the indices `[B']` of those kept, in new order.

        The last images move into the places of the dropped ones, so that large tensors are not copied whole.
        """
        num_kept = int((~done).sum())
        index = torch.arange(num_kept, device=done.device)
        holes = done[:num_kept].nonzero()[:, 0]
        movers = num_kept + (~done[num_kept:]).nonzero()[:, 0]
        index[holes] = movers
        for layers in (self.cross_attention, self.cache):
            for layer, tensors in enumerate(layers):
                for tensor in tensors:
                    tensor[holes] = tensor[movers]
                layers[layer] = tuple(tensor[:num_kept] for tensor in tensors)
        return index


def decode_captions(
    model: BlipTextLMHeadModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    cross_attention: CrossAttention,
    length_penalties: Sequence[float] = (),
    **model_kwargs,
) -> torch.Tensor:
    """Decode B images: the `custom_generate` of a call of `generate`, whose settings `can_decode` must accept.

    `input_ids` `[B * N, T]` are start and prompt tokens, the same in all N rows of an image, its beams or samples.
    `cross_attention`, from `project_images`, is emptied, since its tensors are overwritten. One beam search serves
    several `length_penalties`: where beams go does not depend on it, only which of the finished ones is the best.

    Returns:
        int64 `[B * num_return_sequences, T + new tokens]`, as `generate` returns them; that penalty by penalty.
    """
    num_rows = max(generation_config.num_beams, generation_config.num_return_sequences)
    prompt, layers = input_ids[::num_rows], list(cross_attention)
    cross_attention.clear()
    length = prompt.shape[1]
    decoder = CaptionDecoder(model, layers, length + (generation_config.max_length - length) * num_rows)
    logits = model.cls(decoder.read(prompt)[:, -1])
    rules = []
    for penalty in length_penalties or [generation_config.length_penalty]:
        rules.append(_Rules(logits_processor, stopping_criteria, copy(generation_config)))
        rules[-1].config.length_penalty = penalty
    if generation_config.num_beams == 1:
        return _greedy_search(decoder, prompt, logits, rules[0]).repeat(len(rules), 1)
    return _beam_search(decoder, prompt, logits, rules)


class _Rules(NamedTuple):
    """What `generate` made of its settings, and the settings."""

    process: LogitsProcessorList
    stop: StoppingCriteriaList
    config: GenerationConfig


def _greedy_search(decoder: CaptionDecoder, prompt: torch.Tensor, logits: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """Take the most probable token each time, as `GenerationMixin._sample` does (5.23).

    Of K samples an image, it is the one that `DrawTokens` has drawn. `logits` `[B, V]` are those of the token after
    the prompt `[B, T]`.
    """
    (batch, length), config, number = prompt.shape, rules.config, rules.config.num_return_sequences
    padding = int(config._pad_token_tensor) if config._pad_token_tensor is not None else 0
    results = torch.full((batch, number, config.max_length), padding, device=prompt.device)
    results[:, :, :length] = prompt[:, None]
    captions = torch.arange(batch * number, device=prompt.device).view(batch, number)
    rows = captions[:, 0] // number  # of `results` that are still decoded
    ended = torch.zeros_like(captions, dtype=torch.bool)
    visible = torch.ones(1, number, length, dtype=torch.bool, device=prompt.device)
    itself = torch.eye(number, dtype=torch.bool, device=prompt.device)[None]
    draws = [process for process in rules.process if isinstance(process, DrawTokens)]
    logits = logits[:, None].expand(-1, number, -1)
    while True:
        for draw in draws:
            draw.rows = captions[rows].flatten()
        scores = rules.process(results[rows, :, :length].flatten(0, 1), logits.flatten(0, 1).float())
        tokens = scores.argmax(dim=-1).view(-1, number).masked_fill_(ended, padding)
        results[rows, :, length] = tokens
        length += 1
        ended |= rules.stop(results[rows, :, :length].flatten(0, 1), None).view(-1, number)
        done = ended.all(dim=1)
        if done.all():
            return results.flatten(0, 1)[:, :length]
        if done.any():
            index = decoder.keep(done)
            rows, tokens, ended = rows[index], tokens[index], ended[index]
        visible = torch.cat([visible, itself], dim=2)
        position = torch.full((1,), length - 1, device=prompt.device)
        logits = decoder.model.cls(decoder(tokens, position, visible))


def _beam_search(
    decoder: CaptionDecoder, prompt: torch.Tensor, logits: torch.Tensor, rules: list[_Rules]
) -> torch.Tensor:
    """Decode as `GenerationMixin._beam_search` does (5.23) by rules that differ in the length penalty alone."""
    (batch, start), config = prompt.shape, rules[0].config
    num_beams, num_results = config.num_beams, config.num_return_sequences
    searches = [_Beams(decoder.model, prompt, own) for own in rules]  # whose running beams are the same
    beams = searches[0]
    results = [search.finished[:, :num_results].clone() for search in searches]
    lengths = torch.zeros(len(searches), batch, num_results, dtype=torch.int64, device=prompt.device)
    rows = torch.arange(batch, device=prompt.device)  # of `results` that are still decoded
    itself = torch.eye(num_beams, dtype=torch.bool, device=prompt.device)
    visible = torch.ones(batch, num_beams, start, dtype=torch.bool, device=prompt.device)
    logits = logits[:, None].expand(-1, num_beams, -1)
    while True:
        log_probs = F.log_softmax(logits.flatten(0, 1).float(), dim=-1)
        log_probs = rules[0].process(beams.running[:, :, : beams.length].flatten(0, 1), log_probs)
        (parent, *_), done = zip(*(search.step(log_probs) for search in searches), strict=True)
        done = torch.stack(done).all(dim=0)
        if done.any():
            for search, result, length in zip(searches, results, lengths, strict=True):
                result[rows[done]] = search.finished[done, :num_results]
                length[rows[done]] = (search.finished_parents[done, :num_results] >= 0).sum(dim=-1)
            if done.all():
                return torch.cat(results).flatten(0, 1)[:, : start + int(lengths.max())]
            index = decoder.keep(done)
            for search in searches:
                search.keep(index)
            rows, parent, visible = rows[index], parent[index], visible[index]
        ancestors = visible.gather(1, parent[:, :, None].long().expand(-1, -1, visible.shape[2]))
        visible = torch.cat([ancestors, itself.expand(len(rows), -1, -1)], dim=2)
        position = torch.full((1,), beams.length - 1, device=prompt.device)
        logits = decoder.model.cls(decoder(beams.running[:, :, beams.length - 1], position, visible))


class _Beams:
    """The beams of B images, in tensors of the shapes that the methods of `GenerationMixin` for one step take.

    Attributes:
        running: int64 `[B, num_beams, max_length]`, the beams that go on; `finished`: the best that have ended.
        scores: float32 `[B, num_beams]`, their summed log-probabilities; `finished_scores`: with the length penalty.
        parents: int32 `[B, num_beams, new tokens]`, the beam that each token continued; -1 where there is no token.
        is_finished: bool `[B, num_beams]`, which of `finished` hold a caption.
        improvable: bool `[B, 1]`, whether a running beam can still beat the finished ones.
        length: tokens of the running beams.
    """

    def __init__(self, model: BlipTextLMHeadModel, prompt: torch.Tensor, rules: _Rules):
        self.model, self.rules, config = model, rules, rules.config
        (batch, self.start), num_beams, device = prompt.shape, config.num_beams, prompt.device
        self.length = self.start
        end_tokens = 0 if config._eos_token_tensor is None else len(config._eos_token_tensor)
        self.num_candidates = max(2, 1 + end_tokens) * num_beams  # enough that `num_beams` of them do not end
        filling = -1
        if end_tokens:
            filling = int(config._pad_token_tensor or config._eos_token_tensor[0])  # as in stock, padding 0 is none
        self.running = torch.full((batch, num_beams, config.max_length), filling, device=device)
        self.running[:, :, : self.start] = prompt[:, None]
        # All beams start with the same tokens: only the first may go on, or all would take the same token
        self.scores = torch.zeros(batch, num_beams, device=device)
        self.scores[:, 1:] = -1e9
        self.parents = torch.full((batch, num_beams, config.max_length - self.start), -1, device=device).int()
        self.finished, self.finished_parents = self.running.clone(), self.parents.clone()
        self.finished_scores = torch.full_like(self.scores, -1e9)
        self.is_finished = torch.zeros(batch, num_beams, dtype=torch.bool, device=device)
        self.improvable = torch.ones(batch, 1, dtype=torch.bool, device=device)

    def step(self, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a token to each beam, by stock's methods, given `log_probs` float32 `[B * num_beams, V]` of that token.

        Returns:
            Int `[B, num_beams]`, the beam that each running beam continues, and bool `[B]`, the finished images.
        """
        model, config, num_images, length = self.model, self.rules.config, len(self.running), self.length
        num_beams, early_stopping = config.num_beams, config.early_stopping
        log_probs = log_probs.view(num_images, num_beams, -1) + self.scores[:, :, None]
        scores, sequences, parents = model._get_top_k_continuations(
            accumulated_log_probs=log_probs.flatten(1),
            running_sequences=self.running,
            running_beam_indices=self.parents,
            cur_len=length,
            decoder_prompt_len=self.start,
            do_sample=False,
            beams_to_keep=self.num_candidates,
            num_beams=num_beams,
            batch_size=num_images,
        )
        ends = self.rules.stop(sequences[:, :, : length + 1].flatten(0, 1), None).view(num_images, -1)
        candidates = {
            "topk_log_probs": scores,
            "topk_running_sequences": sequences,
            "topk_running_beam_indices": parents,
            "next_token_hits_stopping_criteria": ends,
            "num_beams": num_beams,
        }
        self.running, self.scores, self.parents = model._get_running_beams_for_next_iteration(**candidates)
        settings = {
            "decoder_prompt_len": self.start,
            "length_penalty": config.length_penalty,
            "early_stopping": early_stopping,
            "is_early_stop_heuristic_unsatisfied": self.improvable,
        }
        self.finished, self.finished_scores, self.finished_parents, self.is_finished = model._update_finished_beams(
            sequences=self.finished,
            beam_scores=self.finished_scores,
            beam_indices=self.finished_parents,
            is_sent_finished=self.is_finished,
            top_num_beam_mask=torch.arange(self.num_candidates, device=ends.device) < num_beams,
            cur_len=length,
            **candidates,
            **settings,
        )
        parent = self.parents[:, :, length - self.start] % num_beams  # stock counts beams through the batch
        self.length += 1
        self.improvable = model._check_early_stop_heuristic(
            running_beam_scores=self.scores,
            beam_scores=self.finished_scores,
            is_sent_finished=self.is_finished,
            cur_len=self.length,
            max_length=config.max_length,
            **settings,
        )
        # Stock goes on until this holds for all images, but no longer changes those for which it does
        done = ~self.improvable[:, 0]
        if early_stopping is True:
            done |= self.is_finished.all(dim=1)
        return parent, done | ends.all()

    def keep(self, index: torch.Tensor) -> None:
        """Keep the images `index` `[B']` alone."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value[index])
