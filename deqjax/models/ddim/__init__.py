"""DEQ-DDIM: denoising U-Net, noise schedules, samplers and the joint equilibrium of a sampling chain."""

from deqjax.models.ddim.config import UNetConfig
from deqjax.models.ddim.inversion import InversionState, exact_gradient, inversion, one_step_gradient, sequential_gradient
from deqjax.models.ddim.joint import JointSystem, attach
from deqjax.models.ddim.parallel import JointSolution, Record, check_slot_by_slot, solve_joint
from deqjax.models.ddim.samplers import (
    NonFiniteOutput,
    Sampled,
    chain_denoiser,
    check_finite,
    encode,
    sample_ddim,
    sample_ddpm,
    slerp,
)
from deqjax.models.ddim.schedule import Chain, betas, select_timesteps, signal_rates
from deqjax.models.ddim.unet import UNet, with_dtype

__all__ = [
    "Chain",
    "InversionState",
    "JointSolution",
    "JointSystem",
    "NonFiniteOutput",
    "Record",
    "Sampled",
    "UNet",
    "UNetConfig",
    "attach",
    "betas",
    "chain_denoiser",
    "check_finite",
    "check_slot_by_slot",
    "encode",
    "exact_gradient",
    "inversion",
    "one_step_gradient",
    "sample_ddim",
    "sample_ddpm",
    "select_timesteps",
    "sequential_gradient",
    "signal_rates",
    "slerp",
    "solve_joint",
    "with_dtype",
]
