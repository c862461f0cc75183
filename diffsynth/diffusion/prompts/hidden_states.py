"""Hidden states of language models, without the layers and heads that come after the last one that is read.

Shapes: B prompts, L tokens, D width.
"""

from collections.abc import Sequence

from torch import Tensor, nn


def hidden_states(
    decoder: nn.Module, depths: Sequence[int], around: nn.Module | None = None, **inputs: Tensor
) -> list[Tensor]:
    """States (B, L, D) of a language model after each number of layers in `depths`; later layers are not run.

    A layer's state is read before the model's last norm. That of depth 0 is not available here.

    Args:
        decoder: A decoder of transformers, with its blocks in `layers`.
        depths: Increasing numbers of layers, from 1 to all.
        around: The model around the decoder that is called, for example one that reads images too; None calls the
            decoder itself.
        inputs: Arguments of the call, such as `input_ids` (B, L).
    """
    every, states = decoder.layers, []
    layers = [every[depth - 1] for depth in depths]
    hooks = [layer.register_forward_hook(lambda _, __, state: states.append(state)) for layer in layers]
    decoder.layers = every[: depths[-1]]
    try:
        (around or decoder)(**inputs, use_cache=False)
    finally:
        decoder.layers = every
        for hook in hooks:
            hook.remove()
    return states


def penultimate_state(decoder: nn.Module, **inputs: Tensor) -> Tensor:
    """The state (B, L, D) of a language model before its last layer, which is not run; see `hidden_states`."""
    (state,) = hidden_states(decoder, [decoder.config.num_hidden_layers - 1], **inputs)
    return state
