"""Greedy and beam search over captions, token for token as `transformers` does, at a fraction of its cost.

What stock `generate` spends on BLIP, and how it is saved here:

* It copies the cross-attention keys and values of each image for each of its beams and gathers all of them again after
  each token. Here they are computed once per image, and its beams attend to them together.
* It gathers the self-attention cache after each token, so that each beam's row holds the keys of its own ancestors.
  Here keys stay where they were written, and a mask says which of them are a beam's ancestors.
* It decodes all images of a batch until the last is finished. Here an image leaves the batch when it is.
* On a CPU it lays out each weight anew for each token, which for a few rows costs as much as the product. Here that is
  done once a batch.

What decides about tokens is stock's own: its logits processors, stopping criteria and the rules by which beams are
ranked and finished are called, so that a setting means here what it means there.
"""

import contextlib

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.models.blip.modeling_blip_text import BlipTextLayer, BlipTextLMHeadModel

from captioning.models.fast_blip.packed_weights import caption_layers, packed_weights


CrossAttention = list[tuple[torch.Tensor, torch.Tensor]]
# Fewer rows read their weights once whatever their layout; to lay all of them out takes as long as 6 to 15 tokens save
PACKED_ROWS = 6
PACKED_TOKENS = 16


def project_images(text_decoder: BlipTextLMHeadModel, image_embeds: torch.Tensor) -> CrossAttention:
    """Project `image_embeds` `[B, P + 1, D]` into the keys and values that each layer's cross-attention looks at.

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


def caption_hidden_states(
    text_decoder: BlipTextLMHeadModel, cross_attention: CrossAttention, input_ids: torch.Tensor
) -> torch.Tensor:
    """Return the last hidden states `[B, L, D]` of captions `[B, L]`, padded at their right.

    Padding needs no mask: no token looks at what stands to its right.
    """
    visible = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool, device=input_ids.device).tril()
    return CaptionDecoder(text_decoder, cross_attention, input_ids.shape[1])(input_ids, 0, visible[None])


class CaptionDecoder:
    """The text decoder with the keys and values of the tokens so far, of B images with any number of rows each.

    Args:
        text_decoder: supplies the layers.
        cross_attention: from `project_images`. `keep` overwrites it.
        num_slots: tokens that each image will have at most, all rows together.
    """

    def __init__(self, text_decoder: BlipTextLMHeadModel, cross_attention: CrossAttention, num_slots: int):
        self.bert = text_decoder.bert
        self.cross_attention = cross_attention
        self.num_slots = num_slots
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer keys and values [B, H, slots, d]
        self.used = 0  # slots

    def __call__(self, tokens: torch.Tensor, first_position: int, visible: torch.Tensor) -> torch.Tensor:
        """Decode N more tokens of each image, which take the next N slots of the cache.

        Args:
            tokens: `[B, N]`: a prompt of N tokens, or the last token of each of N beams.
            first_position: of the tokens in their captions. Tokens of a prompt follow each other, beams stand side by
                side; `visible` says which: where no token sees another, all have the same position.
            visible: bool `[B or 1, N, slots]`, the slots that each token may look at, its own among them.

        Returns:
            The last hidden states `[B, N, D]`.
        """
        number = tokens.shape[1]
        start, self.used = self.used, self.used + number
        own = visible[0, :, start:]
        positions = first_position + own.sum(dim=1) - 1
        hidden = self.bert.embeddings(input_ids=tokens, position_ids=positions[None])
        mask = torch.zeros(visible.shape, dtype=hidden.dtype, device=hidden.device)
        mask = mask.masked_fill_(~visible, float("-inf"))[:, None]
        for index, layer in enumerate(self.bert.encoder.layer):
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
        keys, values = self._slots(index, key)
        keys[:, :, start : self.used] = key
        values[:, :, start : self.used] = value
        context = F.scaled_dot_product_attention(
            query, keys[:, :, : self.used], values[:, :, : self.used], attn_mask=mask
        )
        hidden = layer.attention.output(context.transpose(1, 2).flatten(2), hidden)

        # All rows of an image meet its keys in one product; three rows are too few for a fused kernel to pay
        attention = layer.crossattention.self
        query = attention.query(hidden).unflatten(-1, heads).transpose(1, 2)
        image_keys, image_values = self.cross_attention[index]
        weights = torch.matmul(query / heads[1] ** 0.5, image_keys).softmax(dim=-1)
        context = torch.matmul(weights, image_values)
        hidden = layer.crossattention.output(context.transpose(1, 2).flatten(2), hidden)
        return layer.feed_forward_chunk(hidden)

    def _slots(self, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cached keys and values of a layer."""
        if index == len(self.cache):
            batch, num_heads, _, size = like.shape
            # Not filled: what is not yet used costs no memory on a CPU
            self.cache.append(tuple(like.new_empty(batch, num_heads, self.num_slots, size) for _ in range(2)))
        return self.cache[index]

    def keep(self, done: torch.Tensor) -> torch.Tensor:
        """Let the images of bool `done` `[B]` go, and return the index `[B']` of those that stay, in their new order.

        The last images move into the places of those that go: large tensors are neither allocated nor copied whole.
        """
        number = int((~done).sum())
        index = torch.arange(number, device=done.device)
        holes = done[:number].nonzero()[:, 0]
        movers = number + (~done[number:]).nonzero()[:, 0]
        index[holes] = movers
        for layers in (self.cross_attention, self.cache):
            for layer, tensors in enumerate(layers):
                for tensor in tensors:
                    tensor[holes] = tensor[movers]
                layers[layer] = tuple(tensor[:number] for tensor in tensors)
        return index


@torch.no_grad()
def decode_captions(
    model: BlipTextLMHeadModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    cross_attention: CrossAttention,
    **model_kwargs,
) -> torch.Tensor:
    """Decode by `generation_config`, which `generate` has checked and filled: its `custom_generate`.

    Args:
        model: the text decoder.
        input_ids: `[B * num_beams, T]`, start and prompt tokens, the same in the rows of an image.
        logits_processor: processors that look at one row's tokens alone.
        stopping_criteria: criteria that look at one row's tokens alone.
        generation_config: of a greedy or beam search.
        cross_attention: `project_images` of B images. It is used up.
        model_kwargs: not used.

    Returns:
        int64 `[B * num_return_sequences, T + new tokens]`, as `generate` returns them.

    Raises:
        ValueError: `cross_attention` does not have as many images as `input_ids`.
    """
    prompt = input_ids[:: generation_config.num_beams]
    images = cross_attention[0][0].shape[0] if cross_attention else 0
    if images != len(prompt):
        raise ValueError(f"{len(prompt)} prompts for {images} images; project_images is needed for each call")
    layers = list(cross_attention)
    cross_attention.clear()  # `keep` moves the images about
    new_tokens = generation_config.max_length - prompt.shape[1]
    decoder = CaptionDecoder(model, layers, prompt.shape[1] + new_tokens * generation_config.num_beams)
    search = greedy_search if generation_config.num_beams == 1 else beam_search
    with contextlib.ExitStack() as stack:
        if len(input_ids) >= PACKED_ROWS and new_tokens >= PACKED_TOKENS:
            stack.enter_context(packed_weights(caption_layers(model)))
        return search(model, decoder, prompt, logits_processor, stopping_criteria, generation_config)


def _read_prompt(model: BlipTextLMHeadModel, decoder: CaptionDecoder, prompt: torch.Tensor) -> torch.Tensor:
    """Return the logits `[B, V]` of the token after the prompt `[B, T]`, whose keys all beams share."""
    length = prompt.shape[1]
    visible = torch.ones(1, length, length, dtype=torch.bool, device=prompt.device).tril()
    return model.cls(decoder(prompt, 0, visible)[:, -1])


def greedy_search(
    model: BlipTextLMHeadModel,
    decoder: CaptionDecoder,
    prompt: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
) -> torch.Tensor:
    """Decode the likeliest token each time, as `GenerationMixin._sample` does without sampling (transformers 5.23)."""
    batch, length = prompt.shape
    padding = config._pad_token_tensor if config._pad_token_tensor is not None else 0
    results = torch.full((batch, config.max_length), int(padding), device=prompt.device)
    results[:, :length] = prompt
    rows = torch.arange(batch, device=prompt.device)  # of `results` that are still decoded
    logits = _read_prompt(model, decoder, prompt)
    visible = torch.ones(1, 1, length, dtype=torch.bool, device=prompt.device)
    while True:
        sequences = results[rows, :length]
        tokens = logits_processor(sequences, logits.float()).argmax(dim=-1)
        results[rows, length] = tokens
        length += 1
        done = stopping_criteria(results[rows, :length], None)
        if done.all():
            return results[:, :length]
        if done.any():
            index = decoder.keep(done)
            rows, tokens = rows[index], tokens[index]
        visible = F.pad(visible, (0, 1), value=True)
        logits = model.cls(decoder(tokens[:, None], length - 1, visible)[:, 0])


def beam_search(
    model: BlipTextLMHeadModel,
    decoder: CaptionDecoder,
    prompt: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
) -> torch.Tensor:
    """Decode as `GenerationMixin._beam_search` does (transformers 5.23), whose rules of one step are called."""
    (batch, start), beams, device = prompt.shape, config.num_beams, prompt.device
    end_tokens = 0 if config._eos_token_tensor is None else len(config._eos_token_tensor)
    candidates = max(2, 1 + end_tokens) * beams  # enough that `beams` of them go on when the others end
    may_finish = torch.arange(candidates, device=device) < beams
    filling = -1
    if end_tokens:
        filling = int(config._pad_token_tensor or config._eos_token_tensor[0])  # stock: padding 0 counts as none
    running = torch.full((batch, beams, config.max_length), filling, device=device)
    running[:, :, :start] = prompt[:, None]
    # Beams start alike: only the first has a chance, or all would take the same token
    scores = torch.zeros(batch, beams, device=device)
    scores[:, 1:] = -1e9
    parents = torch.full((batch, beams, config.max_length - start), -1, dtype=torch.int32, device=device)
    finished, finished_scores, finished_parents = running.clone(), torch.full_like(scores, -1e9), parents.clone()
    is_finished = torch.zeros(batch, beams, dtype=torch.bool, device=device)
    improvable = torch.ones(batch, 1, dtype=torch.bool, device=device)
    results = finished[:, : config.num_return_sequences].clone()
    lengths = torch.zeros(results.shape[:2], dtype=torch.int64, device=device)
    rows = torch.arange(batch, device=device)  # of `results` that are still decoded

    logits = _read_prompt(model, decoder, prompt)[:, None].expand(-1, beams, -1)
    visible = torch.ones(batch, beams, start, dtype=torch.bool, device=device)
    length = start
    while True:
        log_probs = F.log_softmax(logits.flatten(0, 1).float(), dim=-1)
        log_probs = logits_processor(running[:, :, :length].flatten(0, 1), log_probs)
        top_scores, top_sequences, top_parents = model._get_top_k_continuations(
            accumulated_log_probs=(log_probs.view(len(rows), beams, -1) + scores[:, :, None]).flatten(1),
            running_sequences=running,
            running_beam_indices=parents,
            cur_len=length,
            decoder_prompt_len=start,
            do_sample=False,
            beams_to_keep=candidates,
            num_beams=beams,
            batch_size=len(rows),
        )
        stops = stopping_criteria(top_sequences[:, :, : length + 1].flatten(0, 1), None).view(len(rows), candidates)
        running, scores, parents = model._get_running_beams_for_next_iteration(
            topk_log_probs=top_scores,
            topk_running_sequences=top_sequences,
            topk_running_beam_indices=top_parents,
            next_token_hits_stopping_criteria=stops,
            num_beams=beams,
        )
        finished, finished_scores, finished_parents, is_finished = model._update_finished_beams(
            sequences=finished,
            topk_running_sequences=top_sequences,
            beam_scores=finished_scores,
            topk_log_probs=top_scores,
            beam_indices=finished_parents,
            topk_running_beam_indices=top_parents,
            is_early_stop_heuristic_unsatisfied=improvable,
            is_sent_finished=is_finished,
            next_token_hits_stopping_criteria=stops,
            top_num_beam_mask=may_finish,
            num_beams=beams,
            cur_len=length,
            decoder_prompt_len=start,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
        )
        parent = parents[:, :, length - start] % beams  # stock counts beams through the batch
        length += 1
        improvable = model._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=improvable,
            running_beam_scores=scores,
            beam_scores=finished_scores,
            is_sent_finished=is_finished,
            cur_len=length,
            max_length=config.max_length,
            decoder_prompt_len=start,
            early_stopping=config.early_stopping,
            length_penalty=config.length_penalty,
        )
        # Stock goes on until this holds for all images, but adds nothing to those for which it does
        done = ~improvable[:, 0]
        if config.early_stopping is True:
            done |= is_finished.all(dim=1)
        if stops.all():
            done[:] = True
        if done.any():
            results[rows[done]] = finished[done, : config.num_return_sequences]
            lengths[rows[done]] = (finished_parents[done, : config.num_return_sequences] >= 0).sum(dim=-1)
            if done.all():
                return results.flatten(0, 1)[:, : start + int(lengths.max())]
            index = decoder.keep(done)
            rows, running, scores, parents, parent = (
                tensor[index] for tensor in (rows, running, scores, parents, parent)
            )
            finished, finished_scores, finished_parents, is_finished, improvable, visible = (
                tensor[index]
                for tensor in (finished, finished_scores, finished_parents, is_finished, improvable, visible)
            )
        ancestors = visible.gather(1, parent[:, :, None].long().expand(-1, -1, visible.shape[2]))
        itself = torch.eye(beams, dtype=torch.bool, device=device).expand(len(rows), -1, -1)
        visible = torch.cat([ancestors, itself], dim=2)
        logits = model.cls(decoder(running[:, :, length - 1], length - 1, visible))
