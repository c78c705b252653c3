"""What the layers of a model keep of the tokens before, as its config tells."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING


def carries_state(config: PreTrainedConfig) -> bool:
    """Whether some layer hands a state from token to token (recurrence, convolution, state space, linear
    attention) instead of looking at each. False also where neither the config nor the model's class tells."""
    text = config.get_text_config(decoder=True)
    try:
        layers = DynamicCache(config=text).layers
    except Exception:  # a config of code of its own, or kinds of layers that transformers has no cache for
        layers = []
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        return True
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    for part in (config, text):
        if type(part) in classes:
            return bool(getattr(classes[type(part)], "_is_stateful", False))
    return False
