"""One chunk from its source latent to its restyled latent, in 1 to 4 passes of the transformer.

Axes in names: B batch, T latent frames, C channels, H and W rows and columns.
"""

from torch import Tensor

from engine.flow_match import add_noise, clean_from_flow
from engine.session import SessionState
from engine.wan.presets import TransformerConfig
from engine.wan.transformer import CausalTransformer


def predict_clean(
    config: TransformerConfig,
    output_BTCHW: Tensor,
    noisy_BTCHW: Tensor,
    source_BTCHW: Tensor,
    sigma_BT: Tensor,
    strength: float = 1.0,
) -> Tensor:
    """The clean latent that the transformer's output stands for.

    Args:
        output_BTCHW: what `CausalTransformer.forward` returned for noisy_BTCHW.
        strength: scales the residual of a `source_residual` model. With the source as an input, starting from
            less noise alone hardly changes its picture. A `flow` model takes no notice.
    """
    if config.prediction == "source_residual":
        return source_BTCHW + strength * output_BTCHW
    return clean_from_flow(noisy_BTCHW, output_BTCHW, sigma_BT)


def denoise_chunk(transformer: CausalTransformer, state: SessionState, source_BTCHW: Tensor) -> Tensor:
    """Restyle one chunk and leave its keys and values in the session's cache.

    At strength 0 the source is the result; the cache keeps what it had.
    """
    plan = state.plan
    if plan.steps == 0:
        return source_BTCHW
    config = transformer.config
    condition = source_BTCHW if config.condition_channels else None
    state.cache.begin_chunk(source_BTCHW.shape[1])
    clean = source_BTCHW
    for step in range(plan.steps):
        sigma_BT = plan.sigmas[step].view(1, 1)
        noisy = add_noise(clean, state.noise, sigma_BT)
        timestep_B = plan.timesteps[step].view(1)
        output = transformer(noisy, condition, timestep_B, state.prompt, state.cache)
        clean = predict_clean(config, output, noisy, source_BTCHW, sigma_BT, plan.strength)
    return clean
