"""Greedy search, samples and beam search, token for token as `transformers` does, at a fraction of its cost.

What stock `generate` spends on BLIP, and how it is saved here:

* It copies the cross-attention keys and values of each image for each of its beams and gathers all of them again after
  each token. Here they are computed once per image, and its beams, or samples, attend to them together.
* It gathers the self-attention cache after each token, so that each beam's row holds the keys of its own ancestors.
  Here keys stay where they were written, and a mask says which of them are a beam's ancestors.
* It decodes all images of a batch until the last is finished. Here a finished image leaves the batch, on a CPU.
* It waits for the GPU after each token, to learn whether all are finished. Here the GPU is asked after every eighth.

Tokens are chosen by stock's own code: its logits processors, its stopping criteria and its rules by which beams are
ranked and finished. So a setting means the same in both.
"""

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from captioning.models.captioner import DrawTokens, WatchTokens
from captioning.models.fast_blip.decoder import CaptionDecoder, CrossAttention, decoder_class


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
    decoder = decoder_class(prompt.device)(model, layers, length + (generation_config.max_length - length) * num_rows)
    if any(isinstance(process, WatchTokens) for process in logits_processor):
        decoder.look_every = 1  # nothing is shown after the end
    logits = model.cls(decoder.read(prompt)[:, -1:]).expand(-1, num_rows, -1)
    decoder.start(num_rows)
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

    Of K samples an image, it is the one that `DrawTokens` has drawn. `logits` `[B, K, V]` are those of the token
    after the prompt `[B, T]`.
    """
    (batch, start), config, number = prompt.shape, rules.config, rules.config.num_return_sequences
    length, device = start, prompt.device
    padding = int(config._pad_token_tensor) if config._pad_token_tensor is not None else 0
    results = torch.full((batch, number, config.max_length), padding, device=device)
    results[:, :, :length] = prompt[:, None]
    captions = torch.arange(batch * number, device=device).view(batch, number)
    rows = captions[:, 0] // number  # of `results` that are still decoded
    ended = torch.zeros_like(captions, dtype=torch.bool)
    new_length = torch.zeros((), dtype=torch.int64, device=device)  # until the last has ended
    draws = [process for process in rules.process if isinstance(process, DrawTokens)]
    while True:
        for draw in draws:
            draw.rows = captions[rows].flatten()
        scores = rules.process(results[rows, :, :length].flatten(0, 1), logits.flatten(0, 1).float())
        tokens = scores.argmax(dim=-1).view(-1, number).masked_fill_(ended, padding)
        results[rows, :, length] = tokens
        length += 1
        new_length += ~ended.all()
        ended |= rules.stop(results[rows, :, :length].flatten(0, 1), None).view(-1, number)
        done = ended.all(dim=1)
        if decoder.someone_leaves(done, length - start, length == config.max_length):
            if done.all():
                return results.flatten(0, 1)[:, : start + int(new_length)]
            index = decoder.keep(done)
            rows, tokens, ended = rows[index], tokens[index], ended[index]
        logits = decoder.step(tokens)


def _beam_search(
    decoder: CaptionDecoder, prompt: torch.Tensor, logits: torch.Tensor, rules: list[_Rules]
) -> torch.Tensor:
    """Decode as `GenerationMixin._beam_search` does (5.23) by rules that differ in the length penalty alone."""
    (batch, start), config = prompt.shape, rules[0].config
    num_results = config.num_return_sequences
    searches = [_Beams(decoder.model, prompt, own) for own in rules]  # whose running beams are the same
    beams = searches[0]
    results = [search.finished[:, :num_results].clone() for search in searches]
    lengths = torch.zeros(len(searches), batch, num_results, dtype=torch.int64, device=prompt.device)
    rows = torch.arange(batch, device=prompt.device)  # of `results` that are still decoded
    while True:
        log_probs = F.log_softmax(logits.flatten(0, 1).float(), dim=-1)
        log_probs = rules[0].process(beams.running[:, :, : beams.length].flatten(0, 1), log_probs)
        (parent, *_), done = zip(*(search.step(log_probs) for search in searches), strict=True)
        done = torch.stack(done).all(dim=0)
        if decoder.someone_leaves(done, beams.length - start, beams.length == config.max_length):
            for search, result, length in zip(searches, results, lengths, strict=True):
                result[rows[done]] = search.finished[done, :num_results]
                length[rows[done]] = (search.finished_parents[done, :num_results] >= 0).sum(dim=-1)
            if done.all():
                return torch.cat(results).flatten(0, 1)[:, : start + int(lengths.max())]
            index = decoder.keep(done)
            for search in searches:
                search.keep(index)
            rows, parent = rows[index], parent[index]
        logits = decoder.step(beams.running[:, :, beams.length - 1], parent)


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
