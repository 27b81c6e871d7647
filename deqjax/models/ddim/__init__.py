"""DEQ-DDIM: denoising U-Net, noise schedules, samplers and the joint equilibrium of a sampling chain."""

from deqjax.models.ddim.config import UNetConfig
from deqjax.models.ddim.schedule import Chain, betas, select_timesteps, signal_rates
from deqjax.models.ddim.unet import UNet, with_dtype

__all__ = ["Chain", "UNet", "UNetConfig", "betas", "select_timesteps", "signal_rates", "with_dtype"]
