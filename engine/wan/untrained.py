"""A model with random weights: what tests and benchmarks use where no trained file is needed."""

import torch

from engine.wan.presets import LIVEBRUSH_TINY, TransformerConfig
from engine.wan.text_encoder import StaticTextEncoder, Style, StyleIndex
from engine.wan.transformer import CausalTransformer
from engine.wan.vae import TinyVAE, TinyVAEConfig
from engine.wan.weights import Model, ModelConfig

VOCABULARY = ("[UNK]", "water", "##color", "watercolor", "color", "ink", "neon", "gray", "pencil", "a", "painting")
STYLES = (
    Style(id="watercolor", name="Watercolour", prompt="watercolor painting", phrases=("water color",)),
    Style(id="neon", name="Neon", prompt="neon"),
)


def untrained_model(
    transformer: TransformerConfig = LIVEBRUSH_TINY,
    vae: TinyVAEConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Random weights everywhere, also where training starts at zero, so that every path has an effect."""
    vae = vae or TinyVAEConfig(latent_channels=transformer.latent_channels)
    modules = CausalTransformer(transformer), TinyVAE(vae)
    random = torch.Generator().manual_seed(seed)
    for module in modules:
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim > 1:
                parameter.data = noise / parameter[0].numel() ** 0.5
            else:
                # Of one dimension are biases, about 0, and the weights of norms, about 1.
                parameter.data = 0.1 * noise + float(name.endswith("weight"))
        module.to(device, dtype).eval().requires_grad_(False)
    table = torch.randint(-127, 128, (len(VOCABULARY), transformer.text_dim), generator=random).to(torch.int8)
    scale = torch.full((len(VOCABULARY), 1), 1 / 64, dtype=torch.float16)
    text = StaticTextEncoder(table, scale, VOCABULARY, transformer.text_len)
    config = ModelConfig(name="untrained", transformer=transformer, vae=vae, sha256="0" * 64)
    return Model(config, *modules, text, StyleIndex(text, STYLES), torch.device(device), dtype)
