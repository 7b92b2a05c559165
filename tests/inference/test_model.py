"""A saved model that captions: what its precision costs."""

import torch
from helpers import make_noise, save_captioner
from torch.profiler import profile

from captioning.inference.model import InferenceModel


def num_casts(model, max_new_tokens):
    """Return how many tensors one image's caption of that length casts, beside the first call."""
    model.generation_config.max_new_tokens = max_new_tokens
    with profile() as profiled:
        model.describe([make_noise(0)])
    return sum(event.count for event in profiled.key_averages() if event.key == "aten::_to_copy")


def test_autocast_casts_the_weights_once_a_batch_and_not_at_each_token(captioner, tmp_path):
    captioner.model.text_decoder.cls.predictions.bias.data[captioner.end_token_id] = -99  # captions that never end
    model = InferenceModel(str(save_captioner(captioner, tmp_path / "model")), settings={"max_new_tokens": 14})
    model._autocast = torch.bfloat16  # as on a GPU
    short, long = (num_casts(model, length) for length in (4, 14))
    decoder = model.captioner.model.text_decoder
    num_layers = sum(isinstance(module, torch.nn.Linear) for module in decoder.modules())
    assert 0 < (long - short) / 10 < 2 * num_layers, "weights and biases of all layers would be as many more"
