"""Latent Perceptual Loss (Berrada et al., ICLR 2025) for latent diffusion and flow models, on PyTorch Lightning."""

import lazy_loader

__version__ = "0.1.0"

# Lightning and diffusers take seconds to import, and import whatever they can use of what is installed.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
