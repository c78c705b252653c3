"""What a model is tried on: ids that mean nothing special to it, and lengths at which its windows and chunks
show."""

from __future__ import annotations

from transformers import PreTrainedConfig

SHORT = 72  # tokens of a trial where no window asks for more: linear attention has chunks of 64
BEYOND = 8  # tokens that it is longer than a window
IDS_AT_MOST = 1000  # different ids of a trial
_SPECIAL = ("_token_id", "_token_ids", "_token_index")  # how a config names ids that mean something


def trial_ids(config: PreTrainedConfig, count: int, seed: int = 0) -> list[int]:
    """`count` ids of a model's vocabulary, none of which its config names (ends, padding, images); others for
    another seed."""
    text = config.get_text_config()
    special = {i for part in (config, text) for i in _named(part)}
    usable = [i for i in range(min(text.vocab_size, IDS_AT_MOST)) if i not in special] or [0]
    return [usable[(7 * i + i * i // 3 + 13 * seed + 1) % len(usable)] for i in range(count)]


def windows_of(config: PreTrainedConfig) -> list[int]:
    """Every size of a window or chunk that the config of a model's text part names, whether layers use it or
    not; ascending."""
    named = config.get_text_config().to_dict()
    sizes = [value for name, value in named.items() if _is_window(name) and isinstance(value, int)]
    return sorted({size for size in sizes if size > 1})


def _is_window(name: str) -> bool:
    """Whether a setting of a config is a number of tokens that some layer takes at a time or looks back."""
    if "pattern" in name or "layers" in name:  # which layers have one
        return False
    return "window" in name or name.endswith(("chunk_size", "chunksize", "block_size", "local_attention"))


def beyond_windows(config: PreTrainedConfig, longest: int) -> int:
    """Tokens after which every window and chunk shows that sequences of up to `longest` tokens meet; 0 where
    they meet none."""
    met = [window for window in windows_of(config) if window < longest]
    return min(longest, met[-1] + BEYOND) if met else 0


def trial_length(config: PreTrainedConfig, longest: int) -> int:
    """Tokens of a trial for sequences of up to `longest` tokens."""
    return max(1, min(longest, max(SHORT, beyond_windows(config, longest))))


def _named(config: PreTrainedConfig) -> set[int]:
    found: set[int] = set()
    for name, value in config.to_dict().items():
        if name.endswith(_SPECIAL):
            found.update(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
    return found
